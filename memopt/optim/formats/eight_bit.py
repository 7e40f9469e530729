"""8bit: one byte an element and state, block 256, power maps, stochastic rounding on both kinds of state.

Signed states take sign(k) (k / 127)^2, k = -127..127; unsigned ones (k / 256)^4, k = 1..256, which has no zero: a
second moment never falls to 0, where the update would blow up. 1 + 4/256 bytes an element and state.
"""

from __future__ import annotations

from memopt.optim.formats.base import Blockwise

FORMAT = Blockwise("8bit", signed="sq127", unsigned="root4", block=256)
