"""The tracker of a trace: beside storages it keeps operations, module calls and what autograd saves."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from memopt.planner.signature import Entry, describe
from memopt.planner.tracing import flops
from memopt.planner.tracing.mixed_norms import corrected
from memopt.planner.tracing.rows import is_row_wise
from memopt.planner.tracing.saving import Holding
from memopt.planner.tracking import PhaseWatcher, Record, StorageTracker, tensors_in
from memopt.planner.values import Category, Phase


@dataclass
class RawOp:
    """An operation as it ran; ``sequence`` numbers the autograd node that it computes for, in backward."""

    flops: int
    bytes_read: int
    bytes_written: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    random: bool
    row_wise: bool
    entry: Entry | None
    sequence: int | None


@dataclass
class Call:
    """One call of a module in forward; ``start`` and ``stop`` number operations, ``sequences`` autograd nodes.

    ``saved`` holds (running number, storage) of what was packed in this call and not in one inside it. ``rows`` is the
    shape of the first argument but for its last dimension, where that is the only tensor given and the output is one
    tensor with the same rows; otherwise None.
    """

    path: str
    kind: type[nn.Module]
    parent: int | None
    start: int
    stop: int
    sequences: tuple[int, int]
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    rows: tuple[int, ...] | None = None
    children: list[int] = field(default_factory=list)
    saved: list[tuple[int, int]] = field(default_factory=list)


class Recorder(StorageTracker):  # type: ignore[no-untyped-call]
    """Follows one training step of fake tensors.

    Args:
        model: its modules' names give the calls their paths.
        device: device type that allocations are rounded for.
        stand_in: from a real tensor that turns up in the step to the fake one that counts for it.
    """

    def __init__(self, model: nn.Module, device: str, stand_in: Callable[[Tensor], Tensor]) -> None:
        self.failed: tuple[str, str] | None = None
        self.raw: list[RawOp] = []
        self.calls: list[Call] = []
        self._packs = 0
        self.saved_dtypes: dict[int, str] = {}
        self.of_weights: set[int] = set()
        self.let_go: dict[int, int] = {}
        self.holding = Holding(super()._ended, lambda: self.clock)
        self._revived: dict[int, Any] = {}
        self._stand_in = stand_in
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._stack: list[tuple[nn.Module, int | None]] = []
        super().__init__(fake=True, device=device)

    def _watch_phases(self) -> PhaseWatcher:
        return PhaseWatcher(
            self,
            root_entered=self._root_entered,
            root_left=self._root_left,
            module_entered=self._module_entered,
            module_left=self._module_left,
            stepped=self.adopt_optimizer,
            backward_started=self._backward_started,
        )

    def observe(self, tensor: Tensor, birth: int | None = None, name: str = "") -> Record | None:
        """As the tracker's; a real tensor (one that the loss function closes over) and its fake twin are one."""
        return super().observe(tensor if isinstance(tensor, FakeTensor) else self._stand_in(tensor), birth, name)

    def pack(self, tensor: Tensor) -> Any:
        """Saved-tensor hook: notes that the innermost module call has saved this tensor's storage."""
        record = self.observe(tensor)
        call = self._innermost()
        if record is not None and call is not None and torch._C._current_graph_task_id() == -1:
            self._packs += 1
            self.calls[call].saved.append((self._packs, record.id))
            self.saved_dtypes.setdefault(record.id, str(tensor.dtype).removeprefix("torch."))
            if not self.is_weight(record) or record.id in self.of_weights:
                return self.holding.hold(tensor, record, self._packs)
        return tensor

    def unpack(self, saved: Any) -> Tensor:
        """The other saved-tensor hook: a tensor over another storage, which counts as the one that was saved."""
        if isinstance(saved, Tensor):
            return saved
        tensor: Tensor = saved.tensor()
        storage, record = tensor.untyped_storage(), saved.record
        key = storage._cdata
        self.holding.bodies[record.id] += 1
        self._live[key] = record
        self._revived[key] = weakref.ref(storage, functools.partial(self._died, key))
        return tensor

    def stop(self) -> None:
        """As the tracker's."""
        self.holding.closed = True
        super().stop()

    def _ended(self, record: Record) -> None:
        """A storage has gone; the record goes with it unless autograd holds it."""
        if not self.holding.body_died(record):
            super()._ended(record)
        elif not self.holding.bodies[record.id]:
            self.let_go.setdefault(record.id, self.clock)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        output = super()._run(func, args, kwargs)
        return output if self.device == "cuda" else corrected(func, args, output)

    def _recorded(self, index: int, func: Any, args: Any, kwargs: Any, output: Any, phase: Phase) -> None:
        inputs = [self.observe(tensor) for tensor in tensors_in((args, kwargs), 4)]
        reads = tuple(dict.fromkeys(record.id for record in inputs if record is not None))
        made = [record for tensor in tensors_in(output, 4) if (record := self.observe(tensor)) is not None]
        changed = [record for t in flops.mutated(func, args, kwargs) if (record := self.observe(t)) is not None]
        writes = tuple(dict.fromkeys([r.id for r in made if r.birth == index and r.producer == index]))
        writes += tuple(dict.fromkeys(r.id for r in changed if r.id not in writes))
        read_bytes, written_bytes = flops.moved_bytes(func, args, kwargs, output) if writes else (0, 0)
        weights = frozenset(
            position
            for position, value in enumerate(args)
            if isinstance(value, Tensor) and self.is_weight(self.observe(value))
        )
        random = flops.is_random(func, args, kwargs)
        if reads and not random and all(self.is_weight(record) for record in inputs):
            self.of_weights.update(writes)
        node = torch._C._current_autograd_node() if phase is Phase.BACKWARD else None
        self.raw.append(
            RawOp(
                flops=flops.count_flops(func, args, kwargs, output),
                bytes_read=read_bytes,
                bytes_written=written_bytes,
                reads=reads,
                writes=writes,
                random=random,
                row_wise=is_row_wise(func, args, output, weights),
                entry=describe(func._schema.name, output),
                sequence=None if node is None else node._sequence_nr(),
            )
        )

    def is_weight(self, record: Record | None) -> bool:
        """Whether a storage holds parameters, or what was made of nothing else (their casts under autocast)."""
        return record is not None and (record.category is Category.WEIGHTS or record.id in self.of_weights)

    def packed(self, call: Call) -> list[tuple[int, int]]:
        """What a call and the calls inside it saved, in order: (running number, storage)."""
        inside, todo = [], [call]
        while todo:
            one = todo.pop()
            inside += one.saved
            todo += [self.calls[child] for child in one.children]
        return sorted(inside)

    def _innermost(self) -> int | None:
        return next((call for _, call in reversed(self._stack) if call is not None), None)

    def _ids(self, value: Any) -> tuple[int, ...]:
        records = (self.observe(tensor) for tensor in tensors_in(value))
        return tuple(dict.fromkeys(record.id for record in records if record is not None))

    def _module_entered(self, module: nn.Module, args: Any) -> None:
        path = self._paths.get(id(module))
        if path is None or torch._C._current_graph_task_id() != -1:
            self._stack.append((module, None))
            return
        parent = self._innermost()
        number, sequence = len(self.calls), torch._C._autograd._get_sequence_nr()
        self.calls.append(Call(path, type(module), parent, self.clock, self.clock, (sequence, sequence)))
        if parent is not None:
            self.calls[parent].children.append(number)
        self._stack.append((module, number))

    def _module_left(self, module: nn.Module, args: Any, kwargs: Any, output: Any, failed: bool) -> None:
        entered, number = self._stack.pop()
        while entered is not module:
            entered, number = self._stack.pop()
        if failed and self.failed is None:
            shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors_in(args))
            self.failed = (self._paths.get(id(module), type(module).__name__), shapes)
        if number is not None:
            call = self.calls[number]
            call.stop = self.clock
            call.sequences = (call.sequences[0], torch._C._autograd._get_sequence_nr())
            call.inputs, call.outputs = self._ids((args, kwargs)), self._ids(_plain(output))
            call.rows = _rows(args, kwargs, output)


def _plain(output: Any) -> Any:
    return dict(output) if hasattr(output, "keys") else output


def _rows(args: Any, kwargs: Any, output: Any) -> tuple[int, ...] | None:
    given = list(tensors_in((args, kwargs)))
    if len(given) != 1 or not args or args[0] is not given[0] or not isinstance(output, Tensor):
        return None
    return tuple(output.shape[:-1]) if output.shape[:-1] == given[0].shape[:-1] else None
