"""Operations on tensors: block quantisation, the fused optimizer step, losses; for CPU, GPU and as plain torch."""

from __future__ import annotations

from memopt.kernels import math
from memopt.kernels.backend import choose_backend
from memopt.kernels.codecs import Codec, codec_names, get_codec, register_codec
from memopt.kernels.losses import LossStats, chunked_loss, contrastive_loss, linear_cross_entropy
from memopt.kernels.quantized import Quantized, dequantize_blockwise, quantize_blockwise
from memopt.kernels.stepping import step
from memopt.kernels.update import State, Update

__all__ = [
    "Codec",
    "LossStats",
    "Quantized",
    "State",
    "Update",
    "choose_backend",
    "chunked_loss",
    "codec_names",
    "contrastive_loss",
    "dequantize_blockwise",
    "get_codec",
    "linear_cross_entropy",
    "math",
    "quantize_blockwise",
    "register_codec",
    "step",
]
