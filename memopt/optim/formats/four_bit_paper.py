"""4bit-paper: the maps of Li, Chen and Zhu, "Memory Efficient Optimizers with 4-bit States" (2023), block 128.

Signed states take the dynamic exponent map, unsigned ones the linear map without zero (k / 16, k = 1..16), both rounded
to nearest. Scales are those of blocks, which the paper uses for one-dimensional parameters and in its fused version;
the rank-1 scales of its other version are not offered. For comparison with published results: ``4bit`` keeps AdamW's
quality better. 1/2 + 4/128 bytes an element and state.
"""

from __future__ import annotations

from memopt.optim.formats.base import Blockwise

FORMAT = Blockwise("4bit-paper", signed="de4", unsigned="linear4", block=128)
