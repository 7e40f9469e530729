"""Quantise and dequantise in Triton: the step's kernel with rules that only encode or only decode.

What such a rule does not use is not loaded: the compiler drops it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.kernels.codecs import Codec
from memopt.kernels.gpu.step import run
from memopt.kernels.quantized import Quantized
from memopt.kernels.request import StepRequest
from memopt.kernels.update import State, Update

ENCODE = Update("quantize", (State("value"),), (), lambda p, g, states, s: (p, (p,)))
DECODE = Update("dequantize", (State("value"),), (), lambda p, g, states, s: (states[0], states))


def quantize(
    x: Tensor, codec: Codec, rounding: str, seed: int, step: int, number: int, offset: int
) -> tuple[Tensor, Tensor]:
    """Codes and scales like the oracle's."""
    x = x.detach().contiguous()
    blocks = codec.blocks(x.shape)
    codes = torch.empty(blocks.code_shape(x.shape, codec.bits), dtype=torch.uint8, device=x.device)
    held = Quantized(codes, torch.empty(blocks.scale_shape, device=x.device), tuple(x.shape), codec)
    run(_request(ENCODE, x, held, rounding, seed, step, number, offset))
    return held.codes, held.scales


def dequantize(codes: Tensor, scales: Tensor, codec: Codec, out: Tensor) -> bool:
    """Writes into ``out``, which is contiguous; True."""
    held = Quantized(codes.contiguous(), scales.contiguous(), tuple(out.shape), codec)
    run(_request(DECODE, out, held, "nearest", 0, 0, 0, 0))
    return True


def _request(
    update: Update, x: Tensor, held: Quantized, rounding: str, seed: int, step: int, number: int, offset: int
) -> StepRequest:
    return StepRequest(
        update, [x], [x], [[held]], (held.codec,), (rounding,), {}, seed, step, [number], [offset], "nearest"
    )
