"""Rows whose softmax gradient waits until the weight's gradient is made from all rows at once, in one rounding.

Row chunks that each add to a 16-bit gradient round it once per chunk. A product over all rows rounds it once, but needs
the softmax gradient (M, V) of all of them. Most of it has a place: H rows fit into the memory of the weight's gradient
itself, which holds nothing yet, and the last chunk stays in the scratch. Only rows beyond those are made again.

In the gradient's memory rows are kept slice by slice: entries ``low`` to ``high`` of H rows lie, row-major, where the
gradient of these entries will be written, so that a slice is read before it is overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from memopt.kernels.losses import huge_pages
from memopt.kernels.losses.problem import Problem
from memopt.kernels.losses.settings import ROW_UNIT, even_chunks, whole_units


class Held:
    """``add`` the softmax gradient of M rows in order, then ``read`` it back slice by slice of ``entries``.

    The first ``again`` rows are not kept, the next ``inside`` (at most H) are in ``gradient``, the last ``behind`` stay
    where they are.
    """

    def __init__(self, weight: Tensor, rows: int, again: int, behind: int, entries: int) -> None:
        self.gradient = huge_pages.empty(*weight.shape, dtype=weight.dtype, device=weight.device)
        self.rows, self.again, self.inside, self.behind = rows, again, rows - again - behind, behind
        self.entries = entries
        self._last: Tensor | None = None

    def add(self, d: Tensor, rows: slice) -> None:
        """Keeps (rows, V) softmax gradients. Those of the last chunk are not copied: they must stay where they are."""
        if self.behind and rows.stop == self.rows:
            self._last = d
        elif rows.stop > self.again:
            first = max(rows.start, self.again)
            d, kept = d[first - rows.start :], slice(first - self.again, rows.stop - self.again)
            for place, low, high in self._places():
                place[:, kept].copy_(d[:, low:high].view(d.shape[0], -1, place.shape[2]).transpose(0, 1))

    def read(self, out: Tensor, low: int, high: int) -> None:
        """Entries ``low`` to ``high``, one slice, of all rows that are kept, into their rows of (M, high - low)."""
        if self.inside:
            H = self.gradient.shape[1]
            out[self.again : self.again + self.inside] = self._flat[low * H : high * H].view(H, -1)[: self.inside]
        if self._last is not None:
            out[self.rows - self.behind :] = self._last[:, low:high]

    @property
    def _flat(self) -> Tensor:
        return self.gradient.view(-1)

    def _places(self) -> Iterator[tuple[Tensor, int, int]]:
        """The gradient's memory as (slices, H, entries): the slices of full width, then a shorter last one."""
        V, H = self.gradient.shape
        whole = V // self.entries * self.entries
        yield self._flat[: whole * H].view(-1, H, self.entries), 0, whole
        if whole < V:
            yield self._flat[whole * H :].view(1, H, V - whole), whole, V


class HeldRows(Held):
    """:class:`Held` for a vocabulary loss: walk through ``chunks``, ``add`` each, ``read`` slices.

    As many rows are ``behind`` as the scratch takes beside a slice of ``entries``. A slice is (M, entries); where
    ignored rows are ``spread`` in between and too many to copy the others together, there is one of all N rows too.
    """

    def __init__(self, problem: Problem, row_bytes: int, keep: bool = True) -> None:
        """``row_bytes`` is what a row takes of a chunk; without ``keep`` every row is made again."""
        p, M = problem, problem.rows
        V, H = p.weight.shape
        item, budget = p.hidden.element_size(), p.settings.chunk_bytes
        self._row_bytes, self._budget = row_bytes, budget
        self.spread = p.index is not None and 4 * M * H * item > budget
        aside = 0 if p.index is None else budget // 16 if self.spread else M * H * item
        per_entry = item * (M + p.hidden.shape[0] if self.spread else M)
        per_entry += M * p.scale.element_size() if p.soft is not None else 0
        wanted = max(budget // 8, ROW_UNIT * per_entry) if keep else budget
        entries = min(p.shard.largest, whole_units(min(wanted, budget - aside) // max(1, per_entry)))
        self.fits = entries >= min(ROW_UNIT, p.shard.largest)
        keep = keep and self.fits
        left = max(0, budget - aside - entries * per_entry)
        behind = min(M, whole_units(left // row_bytes)) if keep else 0
        again = max(0, M - behind - H) if keep else M
        super().__init__(p.weight, M, again, behind, min(entries, V))

    def chunks(self) -> Iterator[slice]:
        """The rows in order; the last chunk is what stays in the scratch."""
        yield from even_chunks(self.again + self.inside, self._row_bytes, self._budget)
        if self.behind:
            yield slice(self.rows - self.behind, self.rows)
