"""Cuts printed statements in two, so that a loop begins an element's slow operations while it finishes the last one's.

A processor looks ahead over few instructions: in a long chain most of them wait. Where roots and divisions of the next
vector start before what follows from those of this one, both have something to do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_SLOW = re.compile(r"\bv(?:sqrt|rsqrt|root4)\w*\(| / ")
_DEFINITION = re.compile(r"(\w+) (\w+) = (.*);")


@dataclass(frozen=True)
class Stages:
    """Statements up to the slow operations, those that follow, and the names that the latter take from the former."""

    first: list[str]
    second: list[str]
    kept: list[str]


def staged(lines: Sequence[str], results: Sequence[str]) -> Stages | None:
    """The two stages of statements ``TYPE NAME = VALUE;`` that ``results`` come from; None where one would be empty."""
    found = [_DEFINITION.fullmatch(line) for line in lines]
    parts = [match.groups() for match in found if match]
    place = {name: i for i, (_, name, _) in enumerate(parts)}
    uses = [{place[word] for word in re.findall(r"\w+", value) if word in place} for _, _, value in parts]
    early, waiting = set[int](), [i for i, (_, _, value) in enumerate(parts) if _SLOW.search(value)]
    while waiting:
        i = waiting.pop()
        if i not in early:
            early.add(i)
            waiting += uses[i]
    late = [i for i in range(len(parts)) if i not in early]
    wanted = {i for j in late for i in uses[j] if i in early} | {place[r] for r in results if place.get(r) in early}
    kept = sorted(wanted)
    if not early or not late or len(parts) < len(lines) or any(parts[i][0] != "vf" for i in kept):
        return None
    return Stages([lines[i] for i in sorted(early)], [lines[i] for i in late], [parts[i][1] for i in kept])


def uses(lines: Sequence[str], name: str) -> bool:
    """Whether a name occurs in statements."""
    return any(name in re.findall(r"\w+", line) for line in lines)
