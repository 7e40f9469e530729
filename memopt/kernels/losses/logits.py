"""What every kernel on logits is given: a chunk of raw logits, and what makes final ones of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Logits:
    """A chunk of logits and what each row is held against.

    Attributes:
        raw: (R, V), any float dtype.
        target: (R,) int64; an index outside [0, V) belongs to no entry of this matrix.
        bias: (V,) in the dtype of ``scale``.
        class_weight: (V,) in the dtype of ``scale``.
        soft: (R, V) target probabilities.
        scale: scalar tensor, float32 (float64 for float64 logits); its dtype is that of all arithmetic.
        softcap: 0 for none.
    """

    raw: Tensor
    target: Tensor | None
    bias: Tensor | None
    class_weight: Tensor | None
    soft: Tensor | None
    scale: Tensor
    softcap: float
