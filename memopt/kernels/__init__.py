"""Operations on tensors: block quantisation, the fused optimizer step, losses, layers; CPU, GPU and plain torch."""

from __future__ import annotations

from memopt.kernels import math
from memopt.kernels.backend import choose_backend
from memopt.kernels.codecs import Codec, codec_names, get_codec, register_codec
from memopt.kernels.layers import (
    geglu,
    layer_norm,
    pack_mask,
    packed_relu,
    rms_norm,
    rotary_,
    seeded_dropout,
    swiglu,
    unpack_mask,
)
from memopt.kernels.losses import LossStats, chunked_loss, contrastive_loss, linear_cross_entropy
from memopt.kernels.quantized import Quantized
from memopt.kernels.quantizing import dequantize_blockwise, quantize_blockwise
from memopt.kernels.stepping import prepare, step, step_request
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
    "geglu",
    "get_codec",
    "layer_norm",
    "linear_cross_entropy",
    "math",
    "pack_mask",
    "packed_relu",
    "prepare",
    "quantize_blockwise",
    "register_codec",
    "rms_norm",
    "rotary_",
    "seeded_dropout",
    "step",
    "step_request",
    "swiglu",
    "unpack_mask",
]
