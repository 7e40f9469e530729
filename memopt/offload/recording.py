"""Recording a block call while it really runs, once, in the first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from memopt.offload.operators import RESHAPES, SHAPE_ONLY, UNWRITTEN, needs_data, written_positions
from memopt.offload.template import Kind, Layout, OpTemplate, Output, Pack, Template, Value
from memopt.offload.trees import Places, operands_and_constants
from memopt.planner.signature import Entry, block_signature, describe

if TYPE_CHECKING:
    from memopt.offload.partitioned import Partitioned


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the operations of one block call and builds its template.

    Args:
        known: storages that are parameters, buffers or inputs: (tensor, kind, name) each.
        keep_copies: copy every outside storage before the block overwrites it, for a replay to start from.
        partitioned: the block's parameters whose storages come and go.
    """

    def __init__(
        self, known: Iterable[tuple[Tensor, Kind, Any]], keep_copies: bool, partitioned: tuple[Partitioned, ...] = ()
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.template = Template()
        self.partitioned = partitioned
        self.paused = False
        self.copies: dict[int, Tensor] = {}
        self._keep_copies = keep_copies
        self._numbers: dict[int, tuple[int, StorageWeakRef]] = {}
        self._unwritten: set[Value] = set()
        self._layouts: dict[Layout, Layout] = {}
        self._entries: list[Entry | None] = []
        self._generators: dict[int, torch.Generator] = {}
        self.generator_states: dict[int, Tensor] = {}
        for tensor, kind, name in known:
            storage = self.number(tensor, kind)
            if storage is not None and kind is not Kind.PARAMETER:
                self.template.outside_names.setdefault(storage, name)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def number(self, tensor: Tensor, kind: Kind = Kind.OUTSIDE) -> int | None:
        """The number of a tensor's storage within the call; None where a tensor has no storage of its own."""
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):
            self.template.opaque = self.template.opaque or f"a tensor of layout {tensor.layout}"
            return None
        key = storage._cdata
        if key not in self._numbers:
            # The weak reference keeps the address from being given to another storage.
            self._numbers[key] = (len(self.template.kinds), StorageWeakRef(storage))  # type: ignore[no-untyped-call]
            self.template.kinds.append(kind)
            self.template.sizes.append(storage.nbytes())
            self.template.versions.append(0)
        return self._numbers[key][0]

    def value(self, tensor: Tensor) -> Value:
        """The storage of a tensor and how often it has been written by now; (-1, 0) where it has none."""
        number = self.number(tensor)
        return (-1, 0) if number is None else (number, self.template.versions[number])

    def packed(self, tensor: Tensor) -> int:
        """Notes a saved tensor; returns the index of its storage among the saved ones, -1 where it has none."""
        value = self.value(tensor)
        kind = self.template.kinds[value[0]] if value[0] >= 0 else None
        saved = given = -1
        if kind in (Kind.MADE, Kind.OUTSIDE):
            saved = _place(self.template.saved, value[0])
        elif kind is Kind.INPUT:
            given = _place(self.template.saved_inputs, value[0])
        elif kind is Kind.PARAMETER:
            owner = next((one for one in self.partitioned if one.holds(tensor)), None)
            if owner is not None:
                self.template.owners[len(self.template.packs)] = owner
        self.template.packs.append(Pack(value, saved, given))
        if value in self._unwritten:
            self.template.opaque = self.template.opaque or "a kernel that writes behind PyTorch's back"
        return saved

    def _layout(self, tensor: Tensor) -> Layout | None:
        try:
            layout = Layout.of(tensor)
        except RuntimeError:
            return None
        return self._layouts.setdefault(layout, layout)

    def touched(self, tensor: Tensor) -> bool:
        """Whether any operation has read, written or made the storage of a tensor."""
        try:
            return tensor.untyped_storage()._cdata in self._numbers
        except (RuntimeError, NotImplementedError):
            return True

    def finish(self) -> Template:
        """The template, once the call is over."""
        self.template.signature = block_signature(self._entries)
        self.template.generators = tuple(self._generators.values())
        self._numbers.clear()
        return self.template

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        tensors, consts = operands_and_constants(args, kwargs)
        written = written_positions(func, args, kwargs, tensors)
        reads = tuple(self.value(tensor) for tensor in tensors)
        # Before it runs: an operation in place may change these.
        layouts = tuple(self._layout(t) for t in tensors)
        for position in written:
            self._about_to_write(reads[position], tensors[position])
        draws = self._draws_from(func, args, kwargs, tensors)
        before = draws.get_state() if draws is not None else None
        output = func(*args, **kwargs)
        random, offset = self._drawn(draws, before)
        for storage in dict.fromkeys(reads[position][0] for position in written):
            if storage >= 0:
                self.template.versions[storage] += 1
        self._note(func, args, kwargs, consts, tensors, reads, layouts, written, output, random, offset)
        return output

    def _about_to_write(self, value: Value, tensor: Tensor) -> None:
        kind = self.template.kinds[value[0]] if value[0] >= 0 else Kind.MADE
        if kind is not Kind.MADE and value[1] == 0 and self._keep_copies and value[0] not in self.copies:
            self.copies[value[0]] = copy_of_storage(tensor)

    def _draws_from(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> torch.Generator | None:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return None
        generator = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Generator)), None)
        if generator is None:
            device = tensors[0].device if tensors else torch.device(kwargs.get("device") or "cpu")
            cuda = device.type == "cuda"
            generator = torch.cuda.default_generators[device.index or 0] if cuda else torch.default_generator
        if id(generator) not in self._generators:
            self._generators[id(generator)] = generator
            self.generator_states[id(generator)] = generator.get_state()
        return generator

    @staticmethod
    def _drawn(generator: torch.Generator | None, before: Tensor | None) -> tuple[bool, int]:
        if generator is None or before is None:
            return False, 0
        after = generator.get_state()
        if torch.equal(before, after):
            return False, 0
        offset = 0
        if generator.device.type == "cuda":
            now = generator.get_offset()
            generator.set_state(before)
            offset = now - generator.get_offset()
            generator.set_state(after)
        return True, offset

    def _note(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        consts: list[Any],
        tensors: list[Tensor],
        reads: tuple[Value, ...],
        layouts: tuple[Layout | None, ...],
        written: tuple[int, ...],
        output: Any,
        random: bool,
        offset: int,
    ) -> None:
        name = func._schema.name
        self._entries.append(describe(name, output))
        items = output if isinstance(output, (tuple, list)) else (output,)
        outputs = tuple(self._output(item, tensors, reads) for item in items)
        versions = self.template.versions
        made = [self.value(item) for item, o in zip(items, outputs, strict=True) if o.fresh]
        made += [(reads[p][0], versions[reads[p][0]]) for p in written if reads[p][0] >= 0]
        if name in UNWRITTEN:
            self._unwritten.update(made)
        elif any(read in self._unwritten for n, read in enumerate(reads) if n not in written) and any(
            o.fresh or o.constant is not None for o in outputs
        ):
            self.template.opaque = self.template.opaque or "a kernel that writes behind PyTorch's back"
        if name in RESHAPES:
            self.template.opaque = (
                self.template.opaque or f"{name.removeprefix('aten::')} changes a tensor's shape in place"
            )
        for item in items:
            if isinstance(item, Tensor) and (item.is_conj() or item.is_neg()):
                self.template.opaque = self.template.opaque or "a lazily conjugated or negated tensor"
        forced = needs_data(func, args) or (
            any(not isinstance(item, Tensor) and item is not None for item in items) and name not in SHAPE_ONLY
        )
        container = type(output) if isinstance(output, (tuple, list)) else None
        self.template.ops.append(
            OpTemplate(
                func,
                layouts,
                consts,
                reads,
                outputs,
                container,
                tuple(made),
                written,
                random,
                offset,
                forced,
                any(tensor.requires_grad for tensor in tensors),
                Places.of(args, kwargs),
            )
        )

    def _output(self, item: Any, tensors: list[Tensor], reads: tuple[Value, ...]) -> Output:
        if not isinstance(item, Tensor):
            return Output(constant=item)
        for position, tensor in enumerate(tensors):
            if item is tensor:
                return Output(position=position, same_object=True)
        known = len(self.template.kinds)
        number = self.number(item, Kind.MADE)
        if number is None:
            return Output()
        layout = self._layout(item)
        if number < known:
            for position, read in enumerate(reads):
                if read[0] == number:
                    return Output(position=position, layout=layout)
            # Shares a storage with something that is no operand: an earlier output of the same operation, say.
            self.template.opaque = self.template.opaque or "an operation whose outputs share a storage"
        return Output(fresh=True, layout=layout)


def _place(found: list[int], storage: int) -> int:
    """The place of a storage in a list, at whose end it is put where it is not there yet."""
    if storage not in found:
        found.append(storage)
    return found.index(storage)


def copy_of_storage(tensor: Tensor) -> Tensor:
    """A tensor of the same layout over a copy of the whole storage."""
    storage = tensor.untyped_storage()
    flat = torch.empty(storage.nbytes(), dtype=torch.uint8, device=tensor.device)
    flat.untyped_storage().copy_(storage)
    return Layout.of(tensor).over(flat)
