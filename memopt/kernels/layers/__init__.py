"""Layers that keep less for backward than torch's own: statistics, a seed, one bit, or nothing but their inputs."""

from __future__ import annotations

from memopt.kernels.layers.dropout import seeded_dropout
from memopt.kernels.layers.gated import geglu, swiglu
from memopt.kernels.layers.masks import pack_mask, unpack_mask
from memopt.kernels.layers.norms import layer_norm, rms_norm
from memopt.kernels.layers.relu import packed_relu
from memopt.kernels.layers.rotary import rotary_

__all__ = [
    "geglu",
    "layer_norm",
    "pack_mask",
    "packed_relu",
    "rms_norm",
    "rotary_",
    "seeded_dropout",
    "swiglu",
    "unpack_mask",
]
