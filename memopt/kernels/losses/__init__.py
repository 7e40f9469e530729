"""Losses whose logits never exist as a whole."""

from __future__ import annotations

from memopt.kernels.losses.chunked import chunked_loss
from memopt.kernels.losses.contrastive import contrastive_loss
from memopt.kernels.losses.dense_ce import dense_linear_cross_entropy
from memopt.kernels.losses.linear_ce import linear_cross_entropy
from memopt.kernels.losses.settings import LossStats

__all__ = ["LossStats", "chunked_loss", "contrastive_loss", "dense_linear_cross_entropy", "linear_cross_entropy"]
