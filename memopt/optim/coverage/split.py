"""Split: state for a part of the model at a time, and an update without state for the rest (FRUGAL)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from memopt import kernels
from memopt.kernels import Update
from memopt.kernels.math import sign
from memopt.optim import checks
from memopt.optim.coverage.blocks import Block, check_sizes, find_blocks, given_blocks
from memopt.optim.coverage.nested import Seat
from memopt.optim.coverage.partial import Partial, require_elementwise, stand_in
from memopt.optim.sharding import is_sharded, local_of, offset_of

SCALARS = ("rate", "keep")
PARTS = ("blocks", "columns", "random")


def _sign(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...]]:
    return s.keep * p - s.rate * sign(g), ()


def _descend(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...]]:
    return s.keep * p - s.rate * g, ()


RESTS = {"sign": Update("signsgd", (), SCALARS, _sign), "sgd": Update("plainsgd", (), SCALARS, _descend)}


class Split(Partial):
    """Updates a part of the model with any optimizer, and the rest without state; the part is chosen anew at times.

    On the part that holds state now, the base optimizer's own step. On the rest, with gradient ``g``::

        p = p (1 - lr weight_decay) - rest_lr lr sign(g)        rest="sign"
        p = p (1 - lr weight_decay) - rest_lr lr g              rest="sgd"

    Every ``switch_every`` steps another part is chosen and its states start empty. At density 1 this is the base
    optimizer, at density 0 the update without state alone, bitwise in both cases.

    Args:
        model: a module, or parameters or parameter groups as torch's optimizers take them.
        base: the optimizer's class, of memopt, torch or others, or a name such as ``"adamw8bit"``.
        density: share of the elements that hold state.
        by: ``"blocks"`` chooses whole blocks, taking turns through a random permutation of them until the share is
            reached; ``"columns"`` chooses columns of every parameter (elements below one index of the first dimension
            count as its columns; parameters of one dimension are chosen whole); ``"random"`` chooses single elements.
        blocks: for ``by="blocks"``: as in :class:`BlockCoordinate`.
        switch_every: steps until the next choice.
        rest: ``"sign"`` or ``"sgd"``.
        rest_lr: the rest's learning rate as a multiple of the group's.
        seed: seed of the choice. Every rank must use the same.
        **options: options of ``base``.

    Memory: ``density`` times the base's bytes a parameter; ``by="random"`` keeps ``4 density`` bytes a parameter of
    indices besides. During the step, copies of the chosen elements and their gradients, 64 MiB at a time (columns and
    random only).

    Raises:
        ValueError: an option out of range; a base that looks at whole parameters, such as Muon, by columns or random;
            sharded parameters with ``by="random"``.

    Reference: Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training"
    (2024), algorithm 1. We differ in that nothing is kept outside the choice: FRUGAL's code always gives embeddings,
    norms and heads state; here, give them to an optimizer of their own where that is wanted.
    """

    def __init__(
        self,
        model: Any,
        base: Any,
        *,
        density: float = 0.25,
        by: str = "blocks",
        blocks: str | Sequence[object] = "auto",
        switch_every: int = 200,
        rest: str = "sign",
        rest_lr: float = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        given: dict[str, Any] = {"density": density, "by": by, "switch_every": switch_every, "seed": seed}
        given |= {"rest": rest, "rest_lr": rest_lr}
        _check_options(given)
        checks.one_of(given, "by", PARTS)
        checks.one_of(given, "rest", tuple(RESTS))
        checks.non_negative(given, "rest_lr")
        super().__init__(model, base, options)
        self.density, self.by, self.switch_every, self.seed = float(density), by, switch_every, seed
        self.rest, self.rest_lr = rest, float(rest_lr)
        self.blocks = self._find(blocks) if by == "blocks" else []
        self._visit, self._since, self._place = 0, 0, 0
        self._chosen: dict[int, Tensor] = {}
        if by != "blocks":
            require_elementwise(self._base_class, f"Split(by={by!r})")
        if by == "random" and any(map(is_sharded, self._named.values())):
            raise ValueError("by='random' does not work on sharded parameters; use 'columns' or 'blocks'")
        self._occupy(self._seats({}))

    @_disable_dynamo  # a compiled training step runs it between its graphs
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on all parameters with gradients; after ``switch_every`` of them, another part is chosen.

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
        self._update_rest()
        self._step_parts()
        self._since += 1
        if self._since >= self.switch_every:
            self._place = self._take()[1] if self.by == "blocks" else 0
            self._visit, self._since = self._visit + 1, 0
            self._occupy(self._seats({}))
        else:
            self._mirror_live()
        return loss

    def _update_rest(self, only: Seat | None = None) -> None:
        """The update without state: of parameters that hold no state at all, or of one whose part does."""
        seated = {seat.index for seat in self._occupied}
        index = -1
        for group in self.param_groups:
            batches: dict[tuple[Any, ...], list[tuple[int, Tensor]]] = {}
            for param in group["params"]:
                index += 1
                wanted = index not in seated if only is None else index == only.index
                if wanted and param.grad is not None:
                    batches.setdefault((param.dtype, param.grad.dtype, param.device), []).append((index, param))
            for batch in batches.values():
                self._rest_step(group, [i for i, _ in batch], [p for _, p in batch])

    def _rest_step(self, group: Mapping[str, Any], numbers: list[int], params: list[Tensor]) -> None:
        lr, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
        uphill = -1.0 if group.get("maximize") else 1.0
        grads = [p.grad for p in params if p.grad is not None]
        kernels.step(
            RESTS[self.rest],
            [local_of(p) for p in params],
            [local_of(g) for g in grads],
            [],
            [],
            {"rate": uphill * lr * self.rest_lr, "keep": 1.0 - lr * decay},
            seed=self.seed,
            step=self._visit * self.switch_every + self._since,
            numbers=numbers,
            offsets=[offset_of(p) for p in params],
            param_rounding="nearest" if group.get("param_rounding", "nearest") == "nearest" else "stochastic",
        )

    def _find(self, blocks: str | Sequence[object]) -> list[Block]:
        if not isinstance(blocks, str):
            return given_blocks(blocks, self._named)
        if blocks != "auto" or self._module is None:
            raise ValueError(f"blocks is {blocks!r}; list the blocks, or pass the module as model and blocks='auto'")
        return find_blocks(self._module)

    def _take(self) -> tuple[set[int], int]:
        """Identities of the parameters whose turn it is, and where in the permutation of the blocks the next begins."""
        total = sum(block.numel for block in self.blocks)
        order = list(range(len(self.blocks)))
        random.Random(str(self.seed)).shuffle(order)
        chosen: list[Block] = []
        place, taken = self._place, 0
        while len(chosen) < len(order):
            block = self.blocks[order[place]]
            over = taken + block.numel / 2 > self.density * total
            if over and (chosen or not self.density):  # a small share still gets one block
                break
            chosen.append(block)
            taken += block.numel
            place = (place + 1) % len(order)
        return {id(p) for block in chosen for p in block.params}, place

    def _seats(self, extras: Mapping[int, Mapping[str, Any]]) -> list[Seat]:
        turn = self._take()[0] if self.by == "blocks" else set()
        self._chosen = {}
        seats, index = [], -1
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                index += 1
                if self.by == "blocks":
                    if id(param) in turn:
                        seats.append(Seat(index, number, param, param))
                elif (seat := self._part(index, number, param)) is not None:
                    seats.append(seat)
        return seats

    def _part(self, index: int, group: int, param: Tensor) -> Seat | None:
        """The seat of the chosen columns or elements of a parameter; None where none is chosen."""
        columns = self.by == "columns" and param.dim() > 1
        length = math.prod(param.shape[1:]) if columns else param.numel()
        count = round(self.density * length)
        if self.by == "columns" and param.dim() < 2:
            count = length if self.density else 0
        if count == 0:
            return None
        if count == length:
            return Seat(index, group, param, param)
        local = local_of(param)
        if columns and math.prod(local.shape[1:]) != length:
            raise ValueError(f"by='columns' needs whole rows, but parameter {index} is sharded along a later dimension")
        draw = torch.Generator().manual_seed(random.Random(f"{self.seed}/{self._visit}/{index}").getrandbits(63))
        kind = torch.int32 if length < 2**31 else torch.int64
        chosen = torch.randperm(length, generator=draw)[:count].sort().values
        self._chosen[index] = chosen.to(local.device, kind)
        if columns:
            return Seat(index, group, param, stand_in(param, (param.shape[0], count), (local.shape[0], count)))
        return Seat(index, group, param, stand_in(param, (count,), (count,)))

    def _gather(self, seat: Seat, tensor: Tensor) -> Tensor:
        return _rows(seat, tensor).index_select(-1, self._chosen[seat.index])

    def _start_values(self, seat: Seat) -> Tensor:
        return self._gather(seat, seat.param)

    def _start_gradient(self, seat: Seat) -> Tensor:
        return self._gather(seat, cast(Tensor, seat.param.grad))

    def _finish(self, seat: Seat) -> None:
        self._update_rest(seat)
        local, rows = local_of(seat.param), _rows(seat, seat.param)
        rows.index_copy_(-1, self._chosen[seat.index].long(), local_of(seat.stand_in))
        if rows.data_ptr() != local.data_ptr():  # a copy, of a parameter that is not contiguous
            local.copy_(rows.view(local.shape))

    def _get_position(self) -> dict[str, Any]:
        return {
            "sizes": [block.numel for block in self.blocks],
            "visit": self._visit,
            "since": self._since,
            "place": self._place,
            "density": self.density,
            "by": self.by,
            "switch_every": self.switch_every,
            "seed": self.seed,
        }

    def _check_position(self, position: Mapping[str, Any]) -> None:
        if position["by"] != self.by:
            raise ValueError(f"it was split by {position['by']}, this optimizer splits by {self.by}")
        check_sizes(position, self.blocks)
        checks.whole(position, "place", maximum=max(len(self.blocks) - 1, 0))
        _check_options(position)

    def _set_position(self, position: Mapping[str, Any]) -> None:
        self._visit, self._since, self._place = position["visit"], position["since"], position["place"]
        self.density, self.switch_every, self.seed = position["density"], position["switch_every"], position["seed"]


def _check_options(given: Mapping[str, Any]) -> None:
    checks.number(given["density"], "density", lambda v: 0 <= v <= 1, "a number from 0 to 1")
    checks.whole(given, "switch_every", minimum=1)
    checks.whole(given, "seed")


def _rows(seat: Seat, tensor: Tensor) -> Tensor:
    """The local part in the shape that the choice counts in: [rows, columns] or [elements]."""
    local = local_of(tensor)
    return local.flatten(1) if seat.stand_in.dim() > 1 else local.reshape(-1)
