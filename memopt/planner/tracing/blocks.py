"""Which module calls are the blocks that a plan works with: repeated siblings, found by what they do.

From the top of the module tree down: where at least two calls of sibling modules (or of one module called again) of one
class run the same operations on the same shapes, all siblings of that class are blocks, and nothing below them. A class
found so is a block wherever else it appears (the first block of a ResNet stage, which has a projection more). Where a
part of the model has no such repetition, siblings of one class that run nearly the same operations on any shapes will
do. What multiplies no matrices (a norm) is no block; modules that torch itself provides are blocks only where they
contain others and repeat exactly. In a model where nothing repeats at all, the largest parts that are called one beside
another and contain modules themselves are the blocks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from memopt.planner.signature import block_signature
from memopt.planner.tracing.recorder import Call, RawOp

_ALIKE = 0.7
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

    def alike(numbers: list[int]) -> set[int]:
        kinds = [Counter(e[0] for op in raw[calls[n].start : calls[n].stop] if (e := op.entry)) for n in numbers]
        same = len(kinds) > 1 and all(_overlap(kinds[0], kind) >= _ALIKE for kind in kinds)
        return set(numbers) if same else set()

    def repeated(numbers: list[int]) -> set[int]:
        prints = {number: call_signature(calls[number], raw) for number in numbers}
        counts = Counter(prints.values())
        return {number for number in numbers if counts[prints[number]] > 1}

    def eligible(number: int) -> bool:
        call = calls[number]
        layer = _is_torch(call.kind) and not call.children
        return not layer and any(op.flops for op in raw[call.start : call.stop])

    chosen: set[int] = set()
    _choose_siblings(tree, calls, eligible, repeated, chosen)
    kinds = {calls[number].kind for number in chosen if not _is_torch(calls[number].kind)}
    _choose_kinds(tree, calls, kinds, chosen)
    for child in _untouched(tree, chosen):
        _choose_siblings(child, calls, eligible, alike, chosen, generic=False)
    if not chosen:
        chosen = _parts(tree, calls, eligible)
    return sorted(chosen, key=lambda number: calls[number].start)


def call_signature(call: Call, raw: Sequence[RawOp]) -> str:
    """The signature of the operations that ran in one call."""
    return block_signature(op.entry for op in raw[call.start : call.stop])


def _is_torch(kind: type[nn.Module]) -> bool:
    return kind.__module__.split(".")[0] == "torch"


def _overlap(a: Counter[str], b: Counter[str]) -> float:
    """Share of the operations of both that they have in common."""
    return (a & b).total() / max(1, (a | b).total())


def _choose_siblings(
    node: _Node,
    calls: Sequence[Call],
    eligible: Callable[[int], bool],
    repeated: Callable[[list[int]], set[int]],
    chosen: set[int],
    generic: bool = True,
) -> None:
    """Adds to ``chosen`` what repeats among the children of a node, or else below them.

    Args:
        eligible: whether a call may be a block at all.
        repeated: from the calls of one class to those that repeat; with them all their siblings of the class are taken.
        generic: whether torch's containers may be blocks; of these only the repeated ones are taken.
    """
    siblings: defaultdict[type[nn.Module], list[int]] = defaultdict(list)
    for child in node.children.values():
        for number in filter(eligible, child.calls):
            siblings[calls[number].kind].append(number)
    taken: set[int] = set()
    for kind, members in siblings.items():
        found = repeated(members)
        if issubclass(kind, _CONTAINERS):
            taken |= found if generic else set()
        elif found:
            taken.update(members)
    chosen |= taken
    for child in node.children.values():
        if taken.isdisjoint(child.calls):
            _choose_siblings(child, calls, eligible, repeated, chosen, generic)


def _choose_kinds(node: _Node, calls: Sequence[Call], kinds: set[type[nn.Module]], chosen: set[int]) -> None:
    for child in node.children.values():
        if chosen.isdisjoint(child.calls):
            found = [number for number in child.calls if calls[number].kind in kinds]
            inner = {number for below in child.descendants() for number in below.calls}
            if found and chosen.isdisjoint(inner):
                chosen.update(found)
            else:
                _choose_kinds(child, calls, kinds, chosen)


def _parts(node: _Node, calls: Sequence[Call], eligible: Callable[[int], bool]) -> set[int]:
    """Calls of the first siblings, from the top down, of which at least two contain modules."""
    inner = {n for part in node.children.values() for n in part.calls if eligible(n) and calls[n].children}
    if len(inner) > 1:
        return inner
    return next((found for child in node.children.values() if (found := _parts(child, calls, eligible))), set())


def _untouched(node: _Node, chosen: set[int]) -> list[_Node]:
    """The largest parts of the tree with no block inside."""
    if chosen.isdisjoint(number for below in node.descendants() for number in below.calls):
        return [node]
    return [
        part for child in node.children.values() if chosen.isdisjoint(child.calls) for part in _untouched(child, chosen)
    ]
