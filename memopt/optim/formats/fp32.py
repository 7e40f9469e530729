"""fp32: 4 bytes an element and state, as torch's own optimizers keep for fp32 parameters."""

from __future__ import annotations

import torch

from memopt.optim.formats.base import Plain

FORMAT = Plain("fp32", torch.float32)
