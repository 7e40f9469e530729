"""Sums the weight's gradient over row chunks, in the weight's own dtype or in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.kernels.losses import huge_pages
from memopt.kernels.losses.settings import Settings

_SLICE_BYTES = 8 * 2**20  # of float32 copies of a chunk's gradient, where the product itself cannot widen


class WeightGradient:
    """``add`` each chunk's softmax gradient (R, V) and hidden rows (R, H); ``finish`` gives their product's sum (V, H).

    In float32 and float64, and with ``accumulate="weight"``: each product is added in float32 arithmetic and rounded to
    the weight's dtype, so with K chunks the rounding error is about sqrt((K + 1) / 2) times that of one rounding, which
    in 16 bits is most of the gradient's error. No memory beyond the gradient.
    ``accumulate="float32"``: one rounding at the end, for 4 bytes per weight until then; in 16 bits on a CPU the
    product runs in float32, at about half the speed.
    """

    def __init__(self, weight: Tensor, settings: Settings) -> None:
        self._dtype = weight.dtype
        narrow = weight.dtype in (torch.bfloat16, torch.float16)
        self._wide = narrow and settings.accumulate == "float32"
        dtype = torch.float32 if self._wide else weight.dtype
        self._sum = huge_pages.empty(*weight.shape, dtype=dtype, device=weight.device)
        self._empty = True

    def add(self, d: Tensor, h: Tensor) -> None:
        if self._wide:
            self._add_wide(d, h)
        elif self._empty:
            torch.mm(d.t(), h, out=self._sum)
        else:
            self._sum.addmm_(d.t(), h)
        self._empty = False

    def _add_wide(self, d: Tensor, h: Tensor) -> None:
        if d.device.type == "cuda":
            if self._empty:
                torch.mm(d.t(), h, out_dtype=torch.float32, out=self._sum)
            else:
                torch.addmm(self._sum, d.t(), h, out_dtype=torch.float32, out=self._sum)
            return
        h = h.float()
        step = max(1, _SLICE_BYTES // max(1, 4 * d.shape[0]))
        for first in range(0, d.shape[1], step):
            entries = slice(first, first + step)
            self._sum[entries].addmm_(d[:, entries].t().float(), h, beta=0.0 if self._empty else 1.0)

    def finish(self) -> Tensor:
        if self._empty:
            self._sum.zero_()
        return self._sum.to(self._dtype)
