"""Low-rank training in a fixed basis: state for a few columns of the DCT of each gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from memopt import kernels
from memopt.kernels import Update
from memopt.optim import checks
from memopt.optim.coverage import dct
from memopt.optim.coverage.nested import Seat
from memopt.optim.coverage.partial import Partial, require_elementwise, stand_in
from memopt.optim.optimizer import RuleOptimizer
from memopt.optim.sharding import is_sharded, local_of, offset_of, reduce_sum

SIDES = ("auto", "columns", "rows")


def _apply(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...]]:
    return s.keep * p + s.scale * g, ()


APPLY = Update("lowrank_apply", (), ("keep", "scale"), _apply)


class LowRankDCT(Partial):
    """Runs any element-wise optimizer on ``rank`` DCT coefficients of each matrix's gradient.

    For a matrix ``W`` with gradient ``G`` [m, n], ``m >= n``, and the orthonormal DCT matrix ``D`` [n, n]::

        S = G D                                       every switch_every steps: choose the rank columns of S with the
        c = columns with the largest sum of |S|       largest sums of magnitudes
        U = what the base optimizer makes of 0 given the gradient G D[:, c]
        W = W (1 - lr weight_decay) + scale U D[:, c]^T

    and the same with rows for columns where ``m < n``. Only the indices ``c`` are stored; the basis is computed when
    used. States of columns that stay chosen go on, those of new columns start at zero. Parameters whose smaller side
    is at most ``rank`` (vectors among them) are left to the base optimizer as they are, so full rank is the base.

    Args:
        model: a module, or parameters or parameter groups as torch's optimizers take them.
        base: the optimizer's class, of memopt, torch or others, or a name such as ``"adamw8bit"``.
        rank: columns per matrix; dimensions after the first count as one.
        switch_every: steps between choices of columns.
        scale: factor of the update of projected matrices.
        side: ``"auto"`` projects the shorter side, ``"columns"`` rows to coefficients (the only one for matrices
            sharded by rows), ``"rows"`` columns to coefficients.
        **options: options of ``base``. ``weight_decay`` of projected matrices is always decoupled.

    Memory: the base's bytes for ``rank`` times the longer side instead of all elements, and 4 bytes an index. During
    the step fp32 coefficients and their gradients, 64 MiB at a time, and 16 MiB pieces of the update.

    Raises:
        ValueError: an option out of range; a base that looks at whole parameters, such as Muon; a matrix sharded by
            rows that would be projected along them.

    Reference: Modoranu et al., "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models" (2025),
    section 3. The rotation of the moments from the old columns to the new ones is, for columns of one orthonormal
    basis, to keep those that stay and drop the others. No error feedback is kept.
    """

    def __init__(
        self,
        model: Any,
        base: Any,
        *,
        rank: int = 128,
        switch_every: int = 200,
        scale: float = 1.0,
        side: str = "auto",
        **options: Any,
    ) -> None:
        given = {"rank": rank, "switch_every": switch_every, "side": side}
        checks.whole(given, "rank", "switch_every", minimum=1)
        checks.number(scale, "scale", math.isfinite, "a finite number")
        checks.one_of(given, "side", SIDES)
        super().__init__(model, base, options)
        require_elementwise(self._base_class, "LowRankDCT")
        self.rank, self.switch_every, self.scale, self.side = rank, switch_every, float(scale), side
        self._visit, self._since = 0, 0
        self._occupy(self._seats({}))

    @_disable_dynamo  # a compiled training step runs it between its graphs
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on all parameters with gradients.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward`` and returns the loss; optional.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._require_dense()
        if self._skips():
            return loss
        if self._since == 0:
            for seat in self._occupied:
                if seat.extra and seat.param.grad is not None:
                    self._choose(seat)
        self._step_parts()
        self._since += 1
        if self._since >= self.switch_every:
            self._visit, self._since = self._visit + 1, 0
        self._mirror_live()
        return loss

    def _get_position(self) -> dict[str, Any]:
        return {"visit": self._visit, "since": self._since, "rank": self.rank, "switch_every": self.switch_every}

    def _check_position(self, position: Mapping[str, Any]) -> None:
        if position["rank"] != self.rank:
            raise ValueError(f"it is of rank {position['rank']}, this optimizer of rank {self.rank}")
        checks.whole(position, "switch_every", minimum=1)

    def _set_position(self, position: Mapping[str, Any]) -> None:
        self._visit, self._since = position["visit"], position["since"]
        self.switch_every = position["switch_every"]

    def _seats(self, extras: Mapping[int, Mapping[str, Any]]) -> list[Seat]:
        seats, index = [], -1
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                index += 1
                seats.append(self._seat(index, number, param, extras.get(index, {})))
        return seats

    def _seat(self, index: int, group: int, param: Tensor, saved: Mapping[str, Any]) -> Seat:
        rows, columns = (param.shape[0], math.prod(param.shape[1:])) if param.dim() > 1 else (1, param.numel())
        along_rows = self.side == "rows" or (self.side == "auto" and rows < columns)
        if (rows if along_rows else columns) <= self.rank or param.dim() < 2:
            return Seat(index, group, param, param)
        local = local_of(param)
        if is_sharded(param) and (along_rows or math.prod(local.shape[1:]) != columns):
            raise ValueError(
                f"parameter {index} of shape {tuple(param.shape)} is sharded along the side that would be projected; "
                "use side='columns' (and sharding by rows)"
            )
        if along_rows:
            part = stand_in(param, (self.rank, columns), (self.rank, columns), torch.float32)
        else:
            part = stand_in(param, (rows, self.rank), (local.shape[0], self.rank), torch.float32)
        chosen = saved.get("columns", torch.arange(self.rank, dtype=torch.int32))
        size = rows if along_rows else columns
        if (
            len(chosen.unique()) != self.rank
            or chosen.shape != (self.rank,)
            or chosen.min() < 0
            or chosen.max() >= size
        ):
            raise ValueError(
                f"columns of parameter {index} are not {self.rank} different ones of {size}; nothing loaded"
            )
        return Seat(index, group, param, part, {"columns": chosen.to(local.device, copy=True)})

    def _along_rows(self, seat: Seat) -> bool:
        return seat.stand_in.shape[0] != seat.param.shape[0]

    def _start_values(self, seat: Seat) -> Tensor:
        return torch.zeros_like(local_of(seat.stand_in), memory_format=torch.contiguous_format)

    def _start_gradient(self, seat: Seat) -> Tensor:
        matrix = local_of(cast(Tensor, seat.param.grad)).flatten(1)
        return dct.project(matrix, seat.extra["columns"], along_rows=self._along_rows(seat))

    def _finish(self, seat: Seat) -> None:
        """Add the update to the parameter, some rows at a time."""
        group, local, along_rows = self.param_groups[seat.group], local_of(seat.param), self._along_rows(seat)
        matrix, made = local.flatten(1), local_of(seat.stand_in)
        basis = dct.columns(matrix.shape[0 if along_rows else 1], seat.extra["columns"])
        keep = 1.0 - float(group["lr"]) * float(group.get("weight_decay", 0.0))
        rounding = "nearest" if group.get("param_rounding", "nearest") == "nearest" else "stochastic"
        for part in dct.row_chunks(matrix):
            kernels.step(
                APPLY,
                [matrix[part]],
                [dct.expand(made, basis, part, along_rows=along_rows).contiguous()],
                [],
                [],
                {"keep": keep, "scale": self.scale},
                seed=int(group.get("seed", 0)),
                step=self._visit * self.switch_every + self._since,
                numbers=[seat.index],
                offsets=[offset_of(seat.param) + part.start * matrix.shape[1]],
                param_rounding=rounding,
            )
        if matrix.data_ptr() != local.data_ptr():  # a copy, of a parameter that is not contiguous
            local.copy_(matrix.view(local.shape))

    def _choose(self, seat: Seat) -> None:
        """Choose columns by the present gradient; those that stay keep their place and their states."""
        along_rows = self._along_rows(seat)
        matrix = local_of(cast(Tensor, seat.param.grad)).flatten(1)
        weights = reduce_sum(dct.weights(matrix, along_rows=along_rows), seat.param)
        best = weights.nan_to_num(nan=0.0).topk(self.rank).indices.to(torch.int32)
        old = seat.extra["columns"]
        staying = torch.isin(old, best)
        seat.extra["columns"][~staying] = best[~torch.isin(best, old)].sort().values
        if self._started and not bool(staying.all()):
            self._forget(seat, (~staying).nonzero().flatten(), 0 if along_rows else 1)

    def _forget(self, seat: Seat, places: Tensor, dimension: int) -> None:
        """Put the states of these columns back to what they start from."""
        inner = cast(torch.optim.Optimizer, self.inner)
        stored = inner.state[seat.stand_in]
        if isinstance(inner, RuleOptimizer):
            group = next(g for outer, g in self._inner_groups() if outer is self.param_groups[seat.group])
            slot = inner.slot(seat.index, group, seat.stand_in, stored)
            for spec in slot.specs:
                value, start = slot.decode(spec), inner.initial_values(group).get(spec.name, 0.0)
                if slot.reach is None:
                    value.index_fill_(dimension, places, start)
                else:  # some elements of the flattened coefficients, sharded by rows
                    width = seat.stand_in.shape[1]
                    columns = torch.arange(slot.offset, slot.offset + value.numel(), device=value.device) % width
                    value.masked_fill_(torch.isin(columns, places).view(value.shape), start)
                slot.write(spec, value)
            return
        for value in stored.values():
            if isinstance(value, Tensor) and value.shape == seat.stand_in.shape:
                local_of(value).index_fill_(dimension, places, 0)
