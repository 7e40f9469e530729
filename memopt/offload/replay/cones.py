"""Which operations bring a value back, and from which sources: decided once per block call, from its template.

The cone of a value is its producer, the producers of what that reads, and so on, until a *source*: a value that is
there anyway (from outside the block, or a saved storage that is kept or swapped).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from memopt.offload.template import Kind, Template, Value

_SMALL_BYTES = 2**16


@dataclass
class Needs:
    """What the recomputed storages of one block call need.

    Attributes:
        sources: for each recomputed saved storage, the saved storages (kept or swapped) that its cone reads.
        copies: outside storages that must be copied before the block overwrites them.
        random: whether the random states at the block's start must be known.
        last_pack: the last saved tensor that a replay must reach; -1 where there is nothing to replay.
        source_packs: saved tensors of sources, one for each storage.
    """

    sources: dict[int, frozenset[int]] = field(default_factory=dict)
    copies: frozenset[int] = frozenset()
    random: bool = False
    last_pack: int = -1
    source_packs: tuple[int, ...] = ()


def needs_of(template: Template, recomputed: Iterable[int], available: Iterable[int]) -> Needs:
    """Walk back from each recomputed storage.

    Args:
        template: the call.
        recomputed, available: indices of saved storages that the plan recomputes, and keeps or swaps.
    """
    recomputed = sorted(recomputed)
    if not recomputed:
        return Needs()
    first_pack: dict[int, int] = {}
    value_of: dict[int, Value] = {}
    last_pack = -1
    for number, pack in enumerate(template.packs):
        if pack.saved >= 0:
            first_pack.setdefault(pack.saved, number)
            value_of[pack.saved] = pack.value
            if pack.saved in recomputed:
                last_pack = number
    mutated = set(template.mutated_outside)
    # A replay that must give up on the template runs everything, so whatever it would draw from must be known.
    random = any(op.random for op in template.ops)
    if template.opaque:
        return Needs({s: frozenset() for s in recomputed}, frozenset(mutated), True, last_pack, ())
    source_of = {value_of[s]: s for s in available}
    producer = {value: number for number, op in enumerate(template.ops) for value in op.made}
    forced = [read for op in template.ops if op.forced for read in op.reads]
    sources: dict[int, frozenset[int]] = {}
    copies = {s for s in mutated if template.kinds[s] is Kind.BUFFER and template.sizes[s] <= _SMALL_BYTES}
    for saved in recomputed:
        todo, done, found = [value_of[saved], *forced], set(), set()
        while todo:
            value = todo.pop()
            if value in done:
                continue
            done.add(value)
            storage, version = value
            if storage < 0:
                continue
            if value in source_of and value != value_of[saved]:
                found.add(source_of[value])
                continue
            if template.kinds[storage] is not Kind.MADE and version in (0, template.versions[storage]):
                # Later calls may change a buffer again, so that only a copy is sure to be what this call read.
                if storage in mutated and (version == 0 or template.kinds[storage] is Kind.BUFFER):
                    copies.add(storage)
                if version == template.versions[storage] and template.kinds[storage] is not Kind.BUFFER:
                    continue
            if value in producer:
                todo.extend(template.ops[producer[value]].reads)
        sources[saved] = frozenset(found)
    used = sorted({s for found in sources.values() for s in found})
    packs = tuple(first_pack[s] for s in used)
    return Needs(sources, frozenset(copies), random, max((last_pack, *packs)), packs)
