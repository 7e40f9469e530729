"""States whose scales are the smaller of their row's and their column's maximum: "rank-1 normalisation" of
Li, Chen and Zhu, "Memory Efficient Optimizers with 4-bit States" (2023), section 4.2.

A maximum over a column is not known before every row has its new values, so a step makes two passes over a parameter,
some rows at a time: the first computes the new values only for their maxima, the second once more to store them.
Between the two, the maxima of a sharded parameter's columns are joined over its ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Any, cast

import torch
from torch import Tensor

from memopt import kernels
from memopt.kernels import Codec, Quantized, State, Update, dequantize_blockwise, get_codec, quantize_blockwise
from memopt.kernels import math as km
from memopt.kernels.strided import cut
from memopt.optim.formats.base import Blockwise, Join, StateFormat, Stored, alone
from memopt.optim.layout import Extent

_LARGEST = torch.finfo(torch.float32).max
PIECE = 1 << 16  # elements handled at once; temporaries of fp32 values, of scales and of quotients, under 1 MiB


@dataclass(frozen=True)
class Factored:
    """A state as codes and the maxima that give its scales: ``scale_ij = min(rows_i, columns_j)``.

    ``codes`` are those of the codec with one block a row; ``rows`` fp32 (rows, 1), ``columns`` fp32 (1, columns), where
    a tensor of more than two dimensions counts as the matrix of its first by all others.
    """

    codes: Tensor
    rows: Tensor
    columns: Tensor
    shape: tuple[int, ...]
    codec: Codec

    def scales(self, first: int, last: int) -> Tensor:
        """The scales of some rows; a maximum that is infinite leaves the other of its elements' two to decide."""
        return torch.minimum(self.rows[first:last], self.columns)

    def decode(self, first: int, last: int) -> Tensor:
        """Some rows as a new fp32 tensor."""
        count, width = last - first, self.columns.shape[1]
        units = self.rows.new_ones(count, 1)
        packed = Quantized(self.codes[first:last], units, (count, width), self.codec.with_block(width))
        return dequantize_blockwise(packed).mul_(self.scales(first, last)).view(count, *self.shape[1:])

    def widen(self, values: Tensor, first: int, last: int) -> None:
        """Raise the maxima to those of some rows' values; one that is not a number counts as infinite."""
        rows = values.reshape(last - first, -1)
        for held, dimension in ((self.rows[first:last], 1), (self.columns, 0)):
            found = rows.amax(dimension, keepdim=True).nan_to_num_(nan=math.inf, posinf=math.inf)
            torch.maximum(held, found, out=held)

    def encode(self, values: Tensor, first: int, last: int) -> None:
        """Store some rows, rounded to nearest under the maxima; ``values`` is used up.

        The largest of every row is its scale, so that each row's largest quotient is exactly 1: what the codec takes
        the row's own scale for.
        """
        rows = values.reshape(last - first, -1)
        rows.div_(self.scales(first, last)).nan_to_num_(nan=1.0, posinf=1.0)
        packed = quantize_blockwise(rows, self.codec.with_block(self.columns.shape[1]))
        self.codes[first:last].copy_(packed.codes)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Rows handled together."""
        count = max(1, PIECE // self.columns.shape[1])
        for first in range(0, self.rows.shape[0], count):
            yield first, min(first + count, self.rows.shape[0])


@dataclass(frozen=True)
class RankOne:
    """Unsigned states of matrices under rank-1 scales, everything else blockwise.

    A parameter takes rank-1 scales where they cost no more than those of blocks, ``rows + columns <= elements /
    block``, by its whole shape alone; a parameter of one dimension, or with few rows or columns, takes blocks.

    Args:
        name: what ``state=`` calls it.
        signed: the codec of states that can be negative, in blocks.
        unsigned: the codec of states that cannot.
        block: elements per scale where blocks are used.
    """

    name: str
    signed: str
    unsigned: str
    block: int

    @property
    def blockwise(self) -> Blockwise:
        """The same maps with scales of blocks throughout."""
        return Blockwise(f"{self.name} (blocks)", self.signed, self.unsigned, self.block)

    def for_extent(self, extent: Extent) -> StateFormat:
        """The format of a parameter of this shape: this one, or blocks."""
        rows, columns = (*extent.shape, 1)[0], math.prod(extent.shape[1:])
        fits = len(extent.shape) > 1 and (rows + columns) * self.block <= rows * columns
        return self if fits else self.blockwise

    def codec(self, spec: State) -> Codec:
        return self.blockwise.codec(spec) if spec.signed else get_codec(self.unsigned)

    def rounding(self, spec: State) -> str:
        return self.codec(spec).rounding

    def keys(self, spec: State) -> tuple[str, ...]:
        if spec.signed:
            return self.blockwise.keys(spec)
        return (f"{spec.name}_codes", f"{spec.name}_row_maxima", f"{spec.name}_column_maxima")

    def allocate(self, spec: State, param: Tensor, extent: Extent) -> Stored:
        if spec.signed:
            return self.blockwise.allocate(spec, param, extent)
        fresh = self._blank(spec, extent, param.device)
        return dict(zip(self.keys(spec), (fresh.codes, fresh.rows, fresh.columns), strict=True))

    def operand(self, spec: State, stored: Mapping[str, Any], extent: Extent) -> Any:
        if spec.signed:
            return self.blockwise.operand(spec, stored, extent)
        codes, rows, columns = (stored[key] for key in self.keys(spec))
        return Factored(codes, rows, columns, extent.local, self.codec(spec))

    def encode(self, spec: State, value: Tensor, extent: Extent, join: Join = alone) -> Stored:
        if spec.signed:
            return self.blockwise.encode(spec, value, extent)
        fresh = self._blank(spec, extent, value.device)
        for first, last in fresh.pieces():
            fresh.widen(value[first:last].detach().float(), first, last)
        join([fresh.columns])
        for first, last in fresh.pieces():
            fresh.encode(value[first:last].detach().to(torch.float32, copy=True).contiguous(), first, last)
        return dict(zip(self.keys(spec), (fresh.codes, fresh.rows, fresh.columns), strict=True))

    def decode(self, spec: State, stored: Mapping[str, Any], extent: Extent) -> Tensor:
        if spec.signed:
            return self.blockwise.decode(spec, stored, extent)
        held: Factored = self.operand(spec, stored, extent)
        parts = [held.decode(first, last) for first, last in held.pieces()]
        return torch.cat(parts) if parts else held.rows.new_zeros(extent.local)

    def _blank(self, spec: State, extent: Extent, device: torch.device) -> Factored:
        rows, columns, codec = extent.local[0], math.prod(extent.shape[1:]), self.codec(spec)
        codes = Quantized.zeros((rows, columns), codec.with_block(columns), device).codes
        maxima = torch.zeros(rows, 1, device=device), torch.zeros(1, columns, device=device)
        return Factored(codes, *maxima, extent.local, codec)

    def step(
        self,
        update: Update,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Sequence[Any]],
        codecs: Sequence[Codec | None],
        scalars: Mapping[str, float],
        *,
        numbers: Sequence[int],
        offsets: Sequence[int],
        join: Join,
        **common: Any,
    ) -> dict[str, Tensor]:
        """As :func:`memopt.kernels.step`, for states some of which are :class:`Factored`.

        Args:
            join: raises each of a list of column maxima, one per parameter, to those of all ranks that hold its rows.
        """
        kept = [j for j, stored in enumerate(states) if any(isinstance(state, Factored) for state in stored)]
        if not kept:
            common |= {"numbers": numbers, "offsets": offsets}
            return kernels.step(update, params, grads, states, codecs, scalars, **common)
        writes = update.writes()
        written = [j for j in kept if writes[j]]
        fresh = {j: [_emptied(state) for state in states[j]] for j in written}
        maxima = _only_states(update, tuple(written))
        plain = [None if j in kept else codec for j, codec in enumerate(codecs)]
        coded = tuple(j for j, codec in enumerate(codecs) if writes[j] and (j in kept or codec is not None))
        update = _spoiled_together(update, coded) if len(coded) > 1 else update

        def run(rule: Update, i: int, first: int, last: int) -> tuple[list[Tensor], dict[str, Tensor]]:
            """The new values of what is written, and the reductions."""
            operands = [_rows(stored[i], first, last) for stored in states]
            sums = kernels.step(
                rule,
                [params[i][first:last]],
                [grads[i][first:last]],
                [[operand] for operand in operands],
                plain,
                scalars,
                numbers=[numbers[i]],
                offsets=[offsets[i] + first * math.prod(params[i].shape[1:])],
                **common,
            )
            news = [cast(Tensor, operands[j]) for j in written]
            for new in news:  # an element that is not finite raises no maximum and starts anew
                new.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            return news, sums

        for i in range(len(params) if written else 0):
            for first, last in fresh[written[0]][i].pieces():
                for j, new in zip(written, run(maxima, i, first, last)[0], strict=True):
                    fresh[j][i].widen(new, first, last)
        if written:
            join([fresh[j][i].columns for i in range(len(params)) for j in written])
        totals = {name: torch.zeros(len(params), device=params[0].device) for name in update.reductions}
        for i in range(len(params)):
            for first, last in states[kept[0]][i].pieces():
                values, sums = run(update, i, first, last)
                for j, new in zip(written, values, strict=True):
                    fresh[j][i].encode(new, first, last)
                for name, value in sums.items():
                    totals[name][i] += value[0]
            for j in written:
                states[j][i].rows.copy_(fresh[j][i].rows)
                states[j][i].columns.copy_(fresh[j][i].columns)
        return totals


def _emptied(state: Factored) -> Factored:
    """The same codes, to be written under maxima that start from 0."""
    return replace(state, rows=torch.zeros_like(state.rows), columns=torch.zeros_like(state.columns))


def _rows(state: Tensor | Quantized | Factored, first: int, last: int) -> Tensor | Quantized:
    if isinstance(state, Factored):
        return state.decode(first, last)
    return cut(state, state.codec, first, last) if isinstance(state, Quantized) else state[first:last]


@lru_cache(maxsize=64)
def _spoiled_together(update: Update, coded: tuple[int, ...]) -> Update:
    """The same rule, with NaN for all of an element's encoded states where one of them is not finite: the pass that
    sees them as plain tensors restarts the same elements as the kernel that encodes the others."""

    def fn(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, ...]:
        new_p, new, *sums = update.fn(p, g, states, s)
        finite = [km.abs(new[j]) <= _LARGEST for j in coded]
        sound = reduce(lambda a, b: a & b, finite)
        return new_p, tuple(km.where(sound, x, math.nan) if j in coded else x for j, x in enumerate(new)), *sums

    return replace(update, name=f"{update.name}_together", fn=fn)


@lru_cache(maxsize=64)
def _only_states(update: Update, written: tuple[int, ...]) -> Update:
    """The same rule that leaves the parameter and every other state as they are."""

    def fn(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...]]:
        _, new, _ = update.apply(p, g, states, s)
        return p, tuple(new[j] if j in written else old for j, old in enumerate(states))

    return replace(update, name=f"{update.name}_maxima", fn=fn, reductions=())
