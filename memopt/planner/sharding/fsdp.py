"""What FSDP2 holds beside its shards: gathered parameters, and copies on their way in both directions.

The units are the blocks, wrapped one by one, and the root, which has every other parameter; ``w`` are the bytes of a
unit's parameters. Read out of ``torch.distributed.fsdp`` (2.13: ``_fsdp_param_group``, ``_fsdp_collectives``) and
checked against metered runs:

- A unit is gathered into a buffer (w) and copied out into parameters (w). In forward the buffer stays until the next
  unit is gathered, after the last one until the model's forward is over. In backward the buffer of the next unit is
  there, gathered ahead, from the moment at which the unit before it has its parameters.
- A block's parameters go at the end of its forward and at the end of its backward. The root's stay from its forward to
  the end of backward, because ``fully_shard`` leaves ``reshard_after_forward`` off for the root.
- A unit's gradients are whole until its backward is over. Then they are copied into a buffer (w), which stays until the
  next unit's backward is over, and their shards are what remains. The root's are whole to the end of backward.

A parameter that the calls of one module use belongs to its unit, every other to the root.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from memopt.planner.sharding.buffers import Extra
from memopt.planner.values import Block, Category, Phase, Storage, Trace
from memopt.planner.variants import pass_starts

ROOT = ""  # its path


@dataclass(frozen=True)
class Pass:
    """One forward and backward: the operations of each, and the calls of blocks in the order in which they run."""

    forward: tuple[int, int]
    backward: tuple[int, int]
    entered: tuple[Block, ...]
    returned: tuple[Block, ...]


def passes(trace: Trace) -> list[Pass]:
    """The passes of a step; more than one where gradients are accumulated."""
    found = []
    for start, end in pairwise([*pass_starts(trace), len(trace.ops)]):
        phases = [op.phase for op in trace.ops[start:end]]
        left = start + 1 + max((i for i, phase in enumerate(phases) if phase is Phase.FORWARD), default=-1)
        behind = [start + i for i, phase in enumerate(phases) if phase is Phase.BACKWARD]
        back = (behind[0], behind[-1] + 1) if behind else (end, end)
        blocks = [block for block in trace.blocks if start <= block.forward[0] < end]
        entered = sorted(blocks, key=lambda block: block.forward)
        returned = sorted((b for b in blocks if b.backward[0] < b.backward[1]), key=lambda block: block.backward)
        found.append(Pass((start, left), back, tuple(entered), tuple(returned)))
    return found


def unit_bytes(trace: Trace, whole: dict[int, int]) -> Counter[str]:
    """Bytes of each unit's whole parameters, by the path of its block; ``whole`` has those of each storage."""
    users: defaultdict[int, set[str]] = defaultdict(set)
    for op in trace.ops:
        if op.phase is not Phase.OPTIMIZER:
            path = ROOT if op.block is None else trace.blocks[op.block].path
            for storage in whole.keys() & set(op.reads):
                users[storage].add(path)
    found: Counter[str] = Counter()
    for storage, size in whole.items():
        paths = users[storage]
        found[next(iter(paths)) if len(paths) == 1 else ROOT] += size
    return found


def gathered_parameters(trace: Trace, whole: dict[int, int]) -> Iterator[Extra]:
    """Parameters of the units that run, and the buffers through which they come."""
    size = unit_bytes(trace, whole)

    def extra(start: int, stop: int, path: str, what: str) -> Extra:
        return Extra(start, stop, size[path], Category.TEMPORARIES, f"{what} {path or 'the root'}")

    for one in passes(trace):
        yield extra(one.forward[0], max(one.forward[1], one.backward[1]), ROOT, "gathered parameters of")
        for block in one.entered:
            yield extra(*block.forward, block.path, "gathered parameters of")
        for block in one.returned:
            yield extra(*block.backward, block.path, "gathered parameters of")
        starts = [one.forward[0], *(block.forward[0] for block in one.entered), one.forward[1]]
        for path, (start, stop) in zip([ROOT, *_paths(one.entered)], pairwise(starts), strict=True):
            yield extra(start, stop, path, "gathering buffer of")
        starts = [one.backward[0], *(block.backward[0] for block in one.returned)]
        for path, (start, stop) in zip(_paths(one.returned), pairwise(starts), strict=True):
            yield extra(start, stop, path, "gathering buffer of")


def reduced_gradients(trace: Trace) -> tuple[dict[int, int | None], list[Extra]]:
    """When each gradient's shard is made, and the whole gradients and buffers before and around that.

    In later passes the trace adds up each gradient at once, where FSDP2 keeps it until the unit's are reduced, and adds
    its shard to the one that is there: such a gradient has no shard of its own (None).
    """
    parts = passes(trace)
    births: dict[int, int | None] = {}
    trained: Counter[str] = Counter()
    found: list[Extra] = []
    for storage in trace.storages:
        if storage.category is not Category.GRADIENTS or storage.producer is None:
            continue
        block = trace.ops[storage.producer].block
        end = next((one.backward[1] for one in parts if storage.birth < one.backward[1]), storage.birth + 1)
        stop = max(storage.birth + 1, end if block is None else trace.blocks[block].backward[1])
        found.append(Extra(storage.birth, stop, storage.bytes, Category.GRADIENTS, f"{storage.name}, whole"))
        if storage.birth > parts[0].backward[1] and storage.death <= end:
            births[storage.id] = None
        else:
            births[storage.id] = stop
            trained[ROOT if block is None else trace.blocks[block].path] += storage.bytes
    for one in parts:
        stops = [*(block.backward[1] for block in one.returned), one.backward[1]]
        for called, (start, stop) in zip(one.returned, pairwise(stops), strict=True):
            name = f"reduction buffer of {called.path}"
            found.append(Extra(start, stop, trained[called.path], Category.TEMPORARIES, name))
    return births, found


def born_when_reduced(storage: Storage, births: dict[int, int | None]) -> Storage:
    """A gradient's shard: born when the unit's gradients are reduced, never where it has none."""
    birth = births.get(storage.id, storage.birth)
    if birth is None:
        return replace(storage, death=storage.birth)
    return replace(storage, birth=birth, death=max(storage.death, birth + 1)) if storage.id in births else storage


def _paths(blocks: Sequence[Block]) -> list[str]:
    return [block.path for block in blocks]
