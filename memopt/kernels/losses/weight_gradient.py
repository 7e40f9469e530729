"""Sums the weight's gradient over row chunks: in the weight's own dtype, in float32, or all at once at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.kernels.losses import huge_pages
from memopt.kernels.losses.held_rows import Held
from memopt.kernels.losses.settings import ROW_UNIT, Settings, whole_units

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


class HeldGradient:
    """The same interface for up to H rows beside the last chunk: they wait in the gradient's own memory.

    Each element is rounded once. No memory beyond the gradient, the last chunk and ``slice_bytes``.
    """

    def __init__(self, weight: Tensor, hidden: Tensor, last: int, slice_bytes: int) -> None:
        """``hidden`` (M, H) are all rows; ``last`` is how many of them the last chunk has."""
        M, V = hidden.shape[0], weight.shape[0]
        entries = min(V, whole_units(max(ROW_UNIT, slice_bytes // (M * hidden.element_size()))))
        self._held = Held(weight, M, 0, last, entries)
        self._hidden = hidden
        self._done = 0

    def add(self, d: Tensor, h: Tensor) -> None:
        rows = slice(self._done, self._done + d.shape[0])
        self._held.add(d, rows)
        self._done = rows.stop

    def finish(self) -> Tensor:
        gradient, entries, M = self._held.gradient, self._held.entries, self._hidden.shape[0]
        space = torch.empty(M * entries, dtype=gradient.dtype, device=gradient.device)
        for low in range(0, gradient.shape[0], entries):
            high = min(low + entries, gradient.shape[0])
            d = space[: M * (high - low)].view(M, -1)
            self._held.read(d, low, high)
            torch.mm(d.t(), self._hidden, out=gradient[low:high])
        return gradient
