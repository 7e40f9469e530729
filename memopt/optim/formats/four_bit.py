"""4bit: half a byte an element and state, block 128, power maps, stochastic rounding on both kinds of state.

Signed states take sign(k) (k / 7)^2, k = -7..7; unsigned ones (k / 16)^2, k = 1..16, which has no zero: a second
moment never falls to 0, where the update would blow up. 1/2 + 4/128 bytes an element and state.
"""

from __future__ import annotations

from memopt.optim.formats.base import Blockwise

FORMAT = Blockwise("4bit", signed="sq15", unsigned="sqrt", block=128)
