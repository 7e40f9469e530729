"""8bit-dynamic: the dynamic map of Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022), block 256.

Rounded to nearest, as there and in bitsandbytes, whose codes these are. Second moments differ in one respect: one that
is not zero never takes code 0 but the first code above it; without that floor heavy-tailed gradients blow the update
up. 1 + 4/256 bytes an element and state.
"""

from __future__ import annotations

from memopt.optim.formats.base import Blockwise

FORMAT = Blockwise("8bit-dynamic", signed="dynamic8", unsigned="dynamic8u", block=256)
