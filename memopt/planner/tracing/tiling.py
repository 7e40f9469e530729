"""Which modules inside the blocks may run in tiles, and a step in which they do.

A module may where every operation in it treats rows alike, found operation by operation; the runtime tries it with real
numbers. It is worth it where it multiplies matrices and saves more inside than its output has, which exists twice for a
moment when the tiles are joined: an MLP is, a projection or a norm by itself is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from memopt.planner.tiles import run_in_tiles
from memopt.planner.tracing.recorder import Call, Recorder
from memopt.planner.values import Tile


def find_tiles(recorder: Recorder, blocks: Iterable[int], chunks: int) -> tuple[Tile, ...]:
    """The largest modules in these block calls that may run in tiles and are worth it, in the order of their calls."""
    found: dict[str, Tile] = {}
    refused: set[str] = set()
    todo = list(blocks)[::-1]
    while todo:
        call = recorder.calls[todo.pop()]
        dim = _dim(recorder, call, chunks)
        if dim is None:
            refused.add(call.path)
            todo += call.children[::-1]
        elif found.setdefault(call.path, Tile(call.path, chunks, dim)).dim != dim:
            refused.add(call.path)
    return tuple(tile for path, tile in found.items() if path not in refused)


def _dim(recorder: Recorder, call: Call, chunks: int) -> int | None:
    """The dimension to cut the call's argument along: the first that is long enough; None where it does not pay."""
    if call.rows is None or not call.path:
        return None
    raw, records = recorder.raw[call.start : call.stop], recorder.history.records
    given = set(call.inputs)
    known = {storage for op in raw for storage in op.writes} | given
    weights = {s for op in raw for s in op.reads if recorder.is_weight(records[s])}
    if not any(op.flops for op in raw):
        return None
    if not all(op.row_wise and known.union(weights).issuperset(op.reads) for op in raw):
        return None
    inside = {storage for _, storage in recorder.packed(call)} - given - weights - set(call.outputs)
    if sum(records[s].bytes for s in inside) <= sum(records[s].bytes for s in call.outputs):
        return None
    return next((dim for dim, size in enumerate(call.rows) if size >= chunks), None)


@contextmanager
def in_tiles(model: nn.Module, tiles: Iterable[Tile]) -> Iterator[None]:
    """Runs its body with these modules in tiles."""
    covered = []
    try:
        for tile in tiles:
            module = model.get_submodule(tile.path)
            covered.append((module, module.__dict__.get("forward")))
            module.forward = partial(run_in_tiles, module.forward, tile.chunks, tile.dim)
        yield
    finally:
        for module, own in covered:
            if own is None:
                del module.forward
            else:
                module.forward = own
