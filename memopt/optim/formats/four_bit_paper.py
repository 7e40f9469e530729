"""4bit-paper: Li, Chen and Zhu, "Memory Efficient Optimizers with 4-bit States" (2023).

Signed states take the dynamic exponent map in blocks of 128; unsigned ones the linear map without zero (k / 16,
k = 1..16) with rank-1 scales, or blocks of 128 where a parameter has one dimension or few rows or columns; all rounded
to nearest. Two differences: a tensor of more than two dimensions counts as a matrix, where the paper takes one maximum
per dimension; and parameters whose rank-1 scales would take more memory than those of blocks take blocks.

For comparison with published results: ``4bit`` keeps AdamW's quality better. 1/2 + 4/128 bytes an element of a signed
state, 1/2 + 4/rows + 4/columns of an unsigned one. A step costs a second pass over the moments, whose codes are handled
apart from the fused step: several times the time of ``4bit``.
"""

from __future__ import annotations

from memopt.optim.formats.rank_one import RankOne

FORMAT = RankOne("4bit-paper", signed="de4", unsigned="linear4", block=128)
