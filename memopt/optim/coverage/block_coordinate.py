"""Block-coordinate training: one block of the model holds gradients, optimizer state and a master copy at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from memopt.optim import checks
from memopt.optim.coverage.blocks import Block, check_sizes, find_blocks, given_blocks
from memopt.optim.coverage.greedy import GradientNorms
from memopt.optim.coverage.nested import Nested, Seat
from memopt.optim.sharding import is_sharded

ORDERS = ("random", "ascending", "descending", "fixed", "greedy")


class BlockCoordinate(Nested):
    """Trains one block of parameters at a time with any optimizer, visiting the blocks in turn (BAdam).

    A visit lasts ``switch_every`` steps. During it only the block's parameters require gradients, so that backward goes
    no deeper than the block, and only they have optimizer state, which starts empty at every visit. Blocks in bf16 or
    fp16 are trained on an fp32 master copy made at the start of the visit and rounded back after every step.

    Args:
        model: a module, or parameters or parameter groups as torch's optimizers take them. Every option of ``base`` can
            be set per group and holds over all visits.
        base: the optimizer's class, of memopt, torch or others, or a name such as ``"adamw8bit"``.
        blocks: ``"auto"`` finds them from the module structure (see ``find_blocks``), or one entry per block: a name of
            a parameter or module, a module, a parameter, or a list of these. Blocks may overlap.
        switch_every: steps per visit.
        order: ``"random"`` (a fresh permutation of all blocks each time round), ``"ascending"``, ``"descending"``,
            ``"fixed"`` (always ``start``), or ``"greedy"``: the block whose gradient has the largest norm, measured on
            the last step of a visit, one parameter's gradient at a time. Micro-batches' squared norms are added up.
        start: the first block for all orders but random; default 0, and the last for descending and greedy.
        seed: seed of the random order. Every rank must use the same.
        master: keep fp32 master copies of parameters below 32 bits. Without, the base updates them directly.
        process_group: average the block's gradients over these ranks in ``step``. It takes the place of
            DistributedDataParallel, whose buffers are as large as the model.
        **options: options of ``base``.

    Memory in bytes, n parameters, the largest block b: weights 2 n (bf16), gradients 2 b, master 4 b and its gradient
    4 b during the step, state of the base b times its bytes a parameter.

    Raises:
        ValueError: an option out of range, or blocks that do not cover the parameters.
        TypeError: a base that is not an optimizer's class or name.

    Reference: Luo, Yu, Li, "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models"
    (2024), algorithm 1; greedy: the Gauss-Southwell block rule of Nutini, Laradji, Schmidt, "Let's Make Block
    Coordinate Descent Converge Faster" (2022). We differ from BAdam's code in that the state dict holds the place in
    the cycle and the master copy (a resumed run is bitwise the uninterrupted one), group options survive switches, and
    embeddings and heads are blocks like others.

    Gradients of a block must not be used after the step that ends its visit: they are dropped there. ``restore`` gives
    all parameters their gradients back.
    """

    def __init__(
        self,
        model: Any,
        base: Any,
        *,
        blocks: str | Sequence[object] = "auto",
        switch_every: int = 100,
        order: str = "random",
        start: int | None = None,
        seed: int = 0,
        master: bool = True,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        given = {"switch_every": switch_every, "order": order, "start": start, "seed": seed, "master": master}
        _check_options(given)
        checks.flag(given, "master")
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(f"process_group is {process_group!r}; it must be a torch.distributed.ProcessGroup or None")
        super().__init__(model, base, options)
        self.blocks = self._find(blocks)
        count = len(self.blocks)
        if start is None:
            start = count - 1 if order in ("descending", "greedy") else 0
        checks.whole({"start": start}, "start", maximum=count - 1)
        self.switch_every, self.order, self.start, self.seed = switch_every, order, start, seed
        self.master, self.process_group = master, process_group
        self._visit, self._since = 0, 0
        self._active = start
        self._active = self._next()
        self._norms = GradientNorms()
        self._occupy(self._seats({}))

    @property
    def active_block(self) -> Block:
        """The block that is trained now."""
        return self.blocks[self._active]

    @_disable_dynamo  # a compiled training step runs it between its graphs
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer on the active block; after ``switch_every`` of them, on to the next block.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward`` and returns the loss; optional.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.process_group is not None:
            self._average(self.process_group)
        if self._skips():
            return loss
        for seat in self._occupied:
            if seat.extra and seat.param.grad is not None:
                seat.stand_in.grad = seat.param.grad.to(seat.stand_in.dtype)
        self._inner_step()
        for seat in self._occupied:
            if seat.extra:
                seat.stand_in.grad = None
                seat.param.copy_(seat.stand_in)
        self._since += 1
        if self._since >= self.switch_every:
            self._switch()
        else:
            self._probe()
            self._mirror_live()
        return loss

    def restore(self) -> None:
        """Let every parameter require gradients again, as before; the optimizer is not to be used afterwards."""
        self._norms.stop()
        for param in self._named.values():
            param.requires_grad_(True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_norms": GradientNorms()}  # hooks are of tensors that a copy does not have

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._probe()

    def _find(self, blocks: str | Sequence[object]) -> list[Block]:
        if isinstance(blocks, str):
            if blocks != "auto":
                raise ValueError(f"blocks is {blocks!r}; it must be 'auto' or a list with one entry per block")
            if self._module is None:
                raise ValueError("blocks='auto' needs the module itself as model; pass it, or list the blocks")
            return find_blocks(self._module)
        return given_blocks(blocks, self._named)

    def _next(self) -> int:
        """The block of the present visit."""
        count = len(self.blocks)
        if self.order == "random":
            around, place = divmod(self._visit, count)
            turn = list(range(count))
            random.Random(f"{self.seed}/{around}").shuffle(turn)  # the same on every rank and after a resume
            return turn[place]
        if self.order == "ascending":
            return (self.start + self._visit) % count
        if self.order == "descending":
            return (self.start - self._visit) % count
        return self._active

    def _switch(self) -> None:
        self._visit, self._since = self._visit + 1, 0
        before = self._active
        self._active = self._norms.largest(self.process_group) if self.order == "greedy" else self._next()
        if self._active == before:  # the same block again goes on with the state it has
            self._norms.stop()
            self._probe()
            self._mirror_live()
        else:
            self._occupy(self._seats({}))

    def _get_position(self) -> dict[str, Any]:
        return {
            "sizes": [block.numel for block in self.blocks],
            "visit": self._visit,
            "since": self._since,
            "block": self._active,
            "order": self.order,
            "start": self.start,
            "switch_every": self.switch_every,
            "seed": self.seed,
        }

    def _check_position(self, position: Mapping[str, Any]) -> None:
        check_sizes(position, self.blocks)
        checks.whole(position, "block", "start", maximum=len(self.blocks) - 1)
        _check_options(position)

    def _set_position(self, position: Mapping[str, Any]) -> None:
        self._visit, self._since, self._active = position["visit"], position["since"], position["block"]
        self.order, self.start = position["order"], position["start"]
        self.switch_every, self.seed = position["switch_every"], position["seed"]

    def _seats(self, extras: Mapping[int, Mapping[str, Any]]) -> list[Seat]:
        wanted = set(map(id, self.active_block.params))
        seats, index = [], 0
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                if id(param) in wanted:
                    seats.append(self._seat(index, number, param, extras.get(index, {})))
                index += 1
        return seats

    def _seat(self, index: int, group: int, param: Tensor, saved: Mapping[str, Any]) -> Seat:
        copied = self.master and param.dtype in (torch.bfloat16, torch.float16)
        if saved and copied != ("master" in saved):
            raise ValueError(
                f"it has {'no ' if copied else 'a '}master copy of parameter {index}, this optimizer keeps "
                f"{'one' if copied else 'none'}; nothing loaded"
            )
        if not copied:
            return Seat(index, group, param, param)
        copy = torch.nn.Parameter(param.detach().float())
        if saved:
            if saved["master"].shape != copy.shape:
                raise ValueError(
                    f"the master copy of parameter {index} is of shape {tuple(saved['master'].shape)}, the parameter "
                    f"of {tuple(copy.shape)}; nothing loaded"
                )
            copy.detach().copy_(saved["master"])
        return Seat(index, group, param, copy, {"master": copy.detach()})

    def _occupy(self, seats: list[Seat], inner: torch.optim.Optimizer | None = None) -> None:
        self._norms.stop()
        wanted = {id(seat.param) for seat in seats}
        for param in self._named.values():
            param.requires_grad_(id(param) in wanted)
            if id(param) not in wanted:
                param.grad = None
        self._occupied = seats
        self._probe()
        super()._occupy(seats, inner)

    def _average(self, group: dist.ProcessGroup) -> None:
        for seat in self._occupied:
            if seat.param.grad is not None and not is_sharded(seat.param):
                dist.all_reduce(seat.param.grad, group=group)
                seat.param.grad.div_(group.size())

    def _probe(self) -> None:
        """Before the last step of a greedy visit: measure the gradients of all blocks."""
        if self.order == "greedy" and self._since == self.switch_every - 1:
            self._norms.start(self.blocks, {seat.param for seat in self._occupied})


def _check_options(given: Mapping[str, Any]) -> None:
    checks.whole(given, "switch_every", minimum=1)
    checks.whole(given, "seed")
    checks.one_of(given, "order", ORDERS)
