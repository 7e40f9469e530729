"""Which module calls are the blocks that a plan works with: repeated siblings, found by what they do.

From the top of the module tree down: where at least two calls of sibling modules (or of one module called again) of one
class run the same operations on the same shapes, all siblings of that class are blocks, and nothing below them. A class
found so is a block wherever else it appears (the first block of a ResNet stage, which has a projection more). Where a
part of the model has no such repetition, siblings of one class that run the same operations on other shapes will do.
Modules that torch itself provides (containers and layers) are blocks only where they repeat exactly, layers never.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from memopt.planner.recorder import Call, RawOp
from memopt.planner.signature import block_signature

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class _Node:
    path: str
    calls: list[int] = field(default_factory=list)
    children: dict[str, _Node] = field(default_factory=dict)

    def descendants(self) -> list[_Node]:
        return [self, *(below for child in self.children.values() for below in child.descendants())]


def find_blocks(calls: Sequence[Call], raw: Sequence[RawOp]) -> list[int]:
    """The numbers of the block calls, in the order in which they start; none contains another."""
    tree = _Node("")
    for number, call in enumerate(calls):
        node = tree
        for part in call.path.split(".") if call.path else ():
            node = node.children.setdefault(part, _Node(f"{node.path}.{part}".lstrip(".")))
        node.calls.append(number)

    def exact(number: int) -> str:
        return call_signature(calls[number], raw)

    def by_name(number: int) -> str:
        entries = (op.entry for op in raw[calls[number].start : calls[number].stop])
        return block_signature((e[0], (), "") for e in entries if e is not None)

    chosen: set[int] = set()
    _choose_repeated(tree, calls, exact, chosen)
    kinds = {calls[number].kind for number in chosen if not _is_torch(calls[number].kind)}
    _choose_kinds(tree, calls, kinds, chosen)
    for child in _untouched(tree, chosen):
        _choose_repeated(child, calls, by_name, chosen, same_shapes=False)
    return sorted(chosen, key=lambda number: calls[number].start)


def call_signature(call: Call, raw: Sequence[RawOp]) -> str:
    """The signature of the operations that ran in one call."""
    return block_signature(op.entry for op in raw[call.start : call.stop])


def _is_torch(kind: type[nn.Module]) -> bool:
    return kind.__module__.split(".")[0] == "torch"


def _may_be_block(calls: Sequence[Call], number: int) -> bool:
    call = calls[number]
    layer = _is_torch(call.kind) and not call.children
    return call.stop > call.start and not layer


def _choose_repeated(
    node: _Node, calls: Sequence[Call], fingerprint: Callable[[int], str], chosen: set[int], same_shapes: bool = True
) -> None:
    siblings: defaultdict[type[nn.Module], list[tuple[int, _Node]]] = defaultdict(list)
    for child in node.children.values():
        for number in child.calls:
            if _may_be_block(calls, number):
                siblings[calls[number].kind].append((number, child))
    taken: set[str] = set()
    for kind, members in siblings.items():
        prints = {number: fingerprint(number) for number, _ in members}
        repeated = {one for one, count in Counter(prints.values()).items() if count > 1}
        generic = issubclass(kind, _CONTAINERS)
        if not repeated or (generic and not same_shapes):
            continue
        for number, child in members:
            if prints[number] in repeated or not generic:
                chosen.add(number)
                taken.add(child.path)
    for child in node.children.values():
        if child.path not in taken:
            _choose_repeated(child, calls, fingerprint, chosen, same_shapes)


def _choose_kinds(node: _Node, calls: Sequence[Call], kinds: set[type[nn.Module]], chosen: set[int]) -> None:
    for child in node.children.values():
        if chosen.isdisjoint(child.calls):
            found = [number for number in child.calls if calls[number].kind in kinds]
            inner = {number for below in child.descendants() for number in below.calls}
            if found and chosen.isdisjoint(inner):
                chosen.update(found)
            else:
                _choose_kinds(child, calls, kinds, chosen)


def _untouched(node: _Node, chosen: set[int]) -> list[_Node]:
    """The largest parts of the tree with no block inside."""
    if chosen.isdisjoint(number for below in node.descendants() for number in below.calls):
        return [node]
    return [
        part for child in node.children.values() if chosen.isdisjoint(child.calls) for part in _untouched(child, chosen)
    ]
