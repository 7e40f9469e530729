"""A recorded stretch of operations whose results are computed when they are asked for, each at most once.

Every storage is a chain of values, one per write. An operation in place takes over the buffer of the value before it
when nobody else needs that value, and works on a copy otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from memopt.offload.recording import copy_of_storage
from memopt.offload.replay.draws import Draws
from memopt.offload.template import Layout
from memopt.offload.trees import with_operands


class Chain:
    """One storage during a replay: its values so far, and where each can come from.

    Attributes:
        version: writes so far.
        producers: the node that makes each version.
        values: tensors over the buffers that exist now, by version.
        owned: versions whose buffer belongs to the replay alone.
        loaders: versions that a kept or swapped storage supplies.
    """

    __slots__ = ("loaders", "owned", "producers", "values", "version")

    def __init__(self) -> None:
        self.version = 0
        self.producers: dict[int, int] = {}
        self.values: dict[int, Tensor] = {}
        self.owned: set[int] = set()
        self.loaders: dict[int, Callable[[], Tensor]] = {}

    def available(self, version: int) -> bool:
        """Whether a version is there without running anything."""
        return version in self.values or version in self.loaders


Key = tuple[Chain, int]


class Hole:
    """The place of an operand that is a value of the tape; it holds on to nothing of the replayed code's graph."""

    __slots__ = ("key", "layout")

    def __init__(self, key: Key, layout: Layout) -> None:
        self.key, self.layout = key, layout


class Node:
    """One recorded operation: its arguments with holes, and the values that it makes, fresh or in place.

    Args:
        args, kwargs: as they were given.
        places: the operands' positions among the arguments, where all are plain ones.
        operands: the tensors among them, in order: real ones, and holes where they are values of the tape. A stand-in
            must not stay: it leads to the replay's graph, whose hooks hold the replay: a cycle that nothing would free.
    """

    __slots__ = (
        "args", "done", "fresh", "func", "holes", "kwargs", "makes", "ordinal", "places", "real", "written",
    )  # fmt: skip

    def __init__(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        operands: Sequence[Hole | Tensor],
        fresh: list[tuple[int, Chain]],
        written: list[Key],
        ordinal: int | None,
        places: tuple[int, ...] | None = None,
    ) -> None:
        self.func = func
        if places is None:
            self.args, self.kwargs = with_operands(args, kwargs, operands)
        else:
            self.args, self.kwargs = list(args), kwargs
            for place, one in zip(places, operands, strict=True):
                self.args[place] = one
        self.places = places
        self.holes: list[Hole] = []
        # What it reads from outside must not change before it runs.
        self.real: list[tuple[Tensor, int]] = []
        for one in operands:
            if isinstance(one, Hole):
                self.holes.append(one)
            else:
                self.real.append((one, one._version))
        self.fresh, self.written, self.ordinal = fresh, written, ordinal
        self.done = False
        self.makes: list[Key] = [(chain, 0) for _, chain in fresh] + written

    def filled(self, tensors: Iterable[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Its arguments, the holes filled in order."""
        if self.places is None:
            return with_operands(self.args, self.kwargs, tensors, Hole)
        source = iter(tensors)
        return [next(source) if type(one) is Hole else one for one in self.args], self.kwargs


class Tape:
    """The operations of one replay.

    Args:
        draws: gives every random operation the state that it had in forward.
    """

    def __init__(self, draws: Draws) -> None:
        self.nodes: list[Node] = []
        self.draws = draws
        self.stale: set[int] = set()
        self.where = ""
        self._uses: defaultdict[Key, int] = defaultdict(int)
        self._counted = False

    def overwritten(self) -> RuntimeError:
        """The error for a parameter that does not hold any more what forward read."""
        return RuntimeError(
            f"a parameter of block {self.where} has been modified by an inplace operation between its forward and its "
            "backward; the plan recomputes values from it"
        )

    def add(self, node: Node) -> None:
        """Append an operation that has just been met."""
        number = len(self.nodes)
        self.nodes.append(node)
        for chain, version in node.makes:
            chain.producers[version] = number
        if node.ordinal is not None:
            self.draws.met(node.ordinal, number)

    def expect(self, wanted: Iterable[Key]) -> None:
        """Count, for every value that the wanted ones take, how often it will be used; each wanted one once more."""
        self._counted = True
        need = set()
        for key in wanted:
            self._uses[key] += 1
            need.add(key)
        for number in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[number]
            if node.done:
                continue
            for key in node.makes:
                if key in need and not key[0].available(key[1]):
                    break
            else:
                continue
            for hole in node.holes:
                self._uses[hole.key] += 1
                need.add(hole.key)
        for node in self.nodes:
            for key in node.makes:
                self._drop_unused(key)

    def get(self, key: Key) -> Tensor:
        """A tensor over the value's buffer, computed now if need be."""
        chain, version = key
        if version not in chain.values:
            if version in chain.loaders:
                chain.values[version] = chain.loaders[version]()
            else:
                for number in self._missing(key):
                    self.run(number)
        return chain.values[version]

    def release(self, key: Key) -> None:
        """One use fewer; the last one frees the buffer."""
        if self._counted:
            self._uses[key] -= 1
            self._drop_unused(key)

    def _drop_unused(self, key: Key) -> None:
        if self._counted and self._uses[key] <= 0:
            chain, version = key
            chain.values.pop(version, None)
            chain.loaders.pop(version, None)
            chain.owned.discard(version)

    def _missing(self, key: Key) -> list[int]:
        """The operations that must run for a value, in order."""
        found: set[int] = set()
        todo = [key]
        while todo:
            chain, version = todo.pop()
            if chain.available(version):
                continue
            number = chain.producers.get(version)
            if number is None:
                raise LookupError("a value from before the block changed it, of which there is no copy")
            if number not in found:
                found.add(number)
                todo.extend(hole.key for hole in self.nodes[number].holes)
        return sorted(found)

    def run(self, number: int) -> Any:
        """Run one operation, whose inputs are there or can be had; returns what the operator returned."""
        node = self.nodes[number]
        for tensor, version in node.real:
            if tensor._version != version or (self.stale and tensor.untyped_storage()._cdata in self.stale):
                raise self.overwritten()
        for key in node.written:
            self._take_over(node, key)
        real = [hole.layout.over(self._input(node, hole.key)) for hole in node.holes]
        args, kwargs = node.filled(real)
        if node.ordinal is None:
            output = node.func(*args, **kwargs)
        else:
            output = self.draws.run(node.ordinal, partial(node.func, *args, **kwargs), self)
        del real, args, kwargs
        node.done = True
        items = output if isinstance(output, (tuple, list)) else (output,)
        for place, chain in node.fresh:
            chain.values[0] = items[place]
            chain.owned.add(0)
        for hole in node.holes:
            self.release(hole.key)
        for key in node.makes:
            self._drop_unused(key)
        return output

    def _input(self, node: Node, read: Key) -> Tensor:
        """The value that an operand has when the operation runs; what it overwrites is already the next version."""
        chain, version = read
        return chain.values[version + 1] if (chain, version + 1) in node.written else self.get(read)

    def _take_over(self, node: Node, key: Key) -> None:
        """Turn the version before into the buffer that the operation will overwrite."""
        chain, version = key
        before = self.get((chain, version - 1))
        mine = sum(hole.key == (chain, version - 1) for hole in node.holes)
        free = self._counted and self._uses[chain, version - 1] <= mine and version - 1 in chain.owned
        chain.values[version] = before if free else copy_of_storage(before)
        chain.owned.add(version)
        if free:
            del chain.values[version - 1]
            chain.owned.discard(version - 1)

    def clear(self) -> None:
        """Let go of everything."""
        for node in self.nodes:
            for chain, _ in node.makes:
                chain.values.clear()
                chain.loaders.clear()
            node.args, node.kwargs, node.holes, node.real = [], {}, [], []
        self.nodes.clear()
