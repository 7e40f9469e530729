"""Quantise and dequantise in Triton: the step's kernel with rules that only encode or only decode.

What such a rule does not use is not loaded: the compiler drops it.
"""

from __future__ import annotations

from torch import Tensor

from memopt.kernels.codecs import Codec
from memopt.kernels.gpu.step import run
from memopt.kernels.hashing import Rounding
from memopt.kernels.quantized import Quantized
from memopt.kernels.request import StepRequest
from memopt.kernels.update import State, Update

ENCODE = Update("quantize", (State("value"),), (), lambda p, g, states, s: (p, (p,)))
DECODE = Update("dequantize", (State("value"),), (), lambda p, g, states, s: (states[0], states))


def quantize(x: Tensor, codes: Tensor, scales: Tensor, codec: Codec, rounding: Rounding) -> bool:
    """Writes codes and scales like the oracle's; True."""
    x = x.contiguous()
    held = Quantized(codes, scales, tuple(x.shape), codec)
    run(_request(ENCODE, x, held, rounding), restart=False)
    return True


def dequantize(codes: Tensor, scales: Tensor, codec: Codec, out: Tensor) -> bool:
    """Writes into ``out``, which is contiguous; True."""
    held = Quantized(codes.contiguous(), scales.contiguous(), tuple(out.shape), codec)
    run(_request(DECODE, out, held, Rounding()))
    return True


def _request(update: Update, x: Tensor, held: Quantized, how: Rounding) -> StepRequest:
    return StepRequest(
        update=update,
        params=[x],
        grads=[x],
        states=[[held]],
        codecs=(held.codec,),
        roundings=(how.kind,),
        scalars={},
        seed=how.seed,
        step=how.step,
        numbers=[how.number],
        offsets=[how.offset],
        param_rounding="nearest",
    )
