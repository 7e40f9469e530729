"""bf16: 2 bytes an element and state. Signed states round to nearest, unsigned ones stochastically.

A second moment moves by a thousandth a step, less than half a bf16 spacing, so rounding to nearest would freeze it.
"""

from __future__ import annotations

import torch

from memopt.optim.formats.base import Plain

FORMAT = Plain("bf16", torch.bfloat16)
