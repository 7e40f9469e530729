"""From what a recorder saw to the ``Trace`` that the rest of the planner works with."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter

import torch
from torch import nn

from memopt.planner.tracing.blocks import call_signature, find_blocks
from memopt.planner.tracing.recorder import Call, Recorder
from memopt.planner.tracking import profile, settle
from memopt.planner.values import Block, Category, Op, Phase, SavedStorage, Storage, Tile, Trace


def assemble(model: nn.Module, recorder: Recorder, tiles: tuple[Tile, ...] = ()) -> Trace:
    """Puts operations, storages and blocks together; times are operation numbers of the traced step."""
    history, raw, calls = recorder.history, recorder.raw, recorder.calls
    categories = settle(history)
    passes = _passes(calls)
    numbers = block_calls(recorder)
    owner = _owners(recorder, [calls[number] for number in numbers])
    ops = tuple(
        Op(
            index=index,
            name=history.names[index],
            phase=history.phases[index],
            block=owner.get(index),
            flops=op.flops,
            bytes_read=op.bytes_read,
            bytes_written=op.bytes_written,
            reads=op.reads,
            writes=op.writes,
            random=op.random,
        )
        for index, op in enumerate(raw)
    )
    end = len(raw)
    storages = tuple(
        Storage(r.id, r.bytes, c, r.birth, end if r.death is None else r.death, r.producer, r.name)
        for r, c in zip(history.records, categories, strict=True)
    )
    parameters = list(model.parameters())
    return Trace(
        model=type(model).__name__,
        ops=ops,
        storages=storages,
        blocks=_blocks(recorder, numbers, passes, owner, storages, bool(tiles)),
        peak_bytes=profile(history, categories).peak_bytes,
        dtype=_main_dtype(parameters),
        meta={
            "parameters": sum(parameter.numel() for parameter in parameters),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "device": recorder.device or "cpu",
            "torch": torch.__version__,
        },
        tiles=tiles,
    )


def _passes(calls: list[Call]) -> list[int]:
    """For each call the forward of the model that it belongs to: the model's own path is empty."""
    found, current = [], -1
    for call in calls:
        current += call.path == "" and call.parent is None
        found.append(current)
    return found


def block_calls(recorder: Recorder) -> list[int]:
    """The blocks of the last pass, and the same calls of every other: what only passes repeat is no block."""
    calls, passes = recorder.calls, _passes(recorder.calls)
    first = next((n for n, number in enumerate(passes) if number == passes[-1]), 0)
    seen: Counter[tuple[int, str]] = Counter()
    keys = []
    for call, number in zip(calls, passes, strict=True):
        keys.append((call.path, seen[number, call.path]))
        seen[number, call.path] += 1
    chosen = {keys[first + number] for number in find_blocks(calls[first:], recorder.raw)}
    return [number for number, key in enumerate(keys) if key in chosen]


def _owners(recorder: Recorder, blocks: list[Call]) -> dict[int, int]:
    """Operation to block: by time in forward, by the autograd node they compute for in backward."""
    owner: dict[int, int] = {}
    for number, call in enumerate(blocks):
        owner.update(dict.fromkeys(range(call.start, call.stop), number))
    firsts = [call.sequences[0] for call in blocks]
    for index, op in enumerate(recorder.raw):
        if op.sequence is not None:
            number = bisect_right(firsts, op.sequence) - 1
            if number >= 0 and op.sequence < blocks[number].sequences[1]:
                owner[index] = number
    return owner


def _blocks(
    recorder: Recorder,
    numbers: list[int],
    passes: list[int],
    owner: dict[int, int],
    storages: tuple[Storage, ...],
    tiled: bool,
) -> tuple[Block, ...]:
    phases = recorder.history.phases
    backward: dict[int, list[int]] = {}
    for index, number in owner.items():
        if phases[index] is Phase.BACKWARD:
            backward.setdefault(number, []).append(index)
    groups: dict[tuple[object, ...], int] = {}
    seen: Counter[tuple[int, str]] = Counter()
    blocks = []
    for position, number in enumerate(numbers):
        call = recorder.calls[number]
        saved, saved_inputs = _saved(recorder, number, storages, tiled)
        signature = call_signature(call, recorder.raw)
        work = tuple((op.flops, op.bytes_read) for op in recorder.raw[call.start : call.stop])
        key = (call.kind, signature, work, tuple(s.bytes for s in saved))
        ran = backward.get(position, [len(phases)])
        blocks.append(
            Block(
                path=call.path,
                call=seen[passes[number], call.path],
                group=groups.setdefault(key, len(groups)),
                forward=(call.start, call.stop),
                backward=(min(ran), min(max(ran) + 1, len(phases))),
                inputs=call.inputs,
                outputs=call.outputs,
                saved=saved,
                signature=signature,
                saved_inputs=saved_inputs,
            )
        )
        seen[passes[number], call.path] += 1
    return tuple(blocks)


def _saved(
    recorder: Recorder, number: int, storages: tuple[Storage, ...], tiled: bool
) -> tuple[tuple[SavedStorage, ...], tuple[SavedStorage, ...]]:
    """What autograd saves in a call, weights aside: first what is not among its inputs, then what is."""
    call = recorder.calls[number]
    inputs = set(call.inputs)
    packed = [storages[id] for id in dict.fromkeys(id for _, id in recorder.packed(call))]
    packed = [storage for storage in packed if storage.category is not Category.WEIGHTS]
    own = [storage for storage in packed if storage.id not in inputs]
    given = [storage for storage in packed if storage.id in inputs]
    return _numbered(recorder, call, own, tiled), _numbered(recorder, call, given, tiled)


def _let_go(recorder: Recorder, call: Call, storage: Storage, tiled: bool) -> int:
    """When others let go of a saved storage: forward, and autograd for other calls.

    Autocast's cache would hold casts of weights longer than under a plan, where it lasts no longer than a block's call
    in tiles, and a block without tiles has none.
    """
    if storage.id in recorder.of_weights:
        return call.stop if tiled else 0
    own = {number for number, _ in recorder.packed(call)}
    return max(recorder.let_go.get(storage.id, storage.death), recorder.holding.until(storage.id, own))


def _numbered(recorder: Recorder, call: Call, found: list[Storage], tiled: bool) -> tuple[SavedStorage, ...]:
    return tuple(
        SavedStorage(
            index=index,
            storage=storage.id,
            bytes=storage.bytes,
            producer=-1 if storage.producer is None else storage.producer,
            token_wise=storage.producer is not None and recorder.raw[storage.producer].row_wise,
            dtype=recorder.saved_dtypes.get(storage.id, ""),
            let_go=_let_go(recorder, call, storage, tiled),
        )
        for index, storage in enumerate(found)
    )


def _main_dtype(parameters: list[nn.Parameter]) -> str:
    """The type of most trained bytes, or of most bytes where nothing is trained."""
    counts: Counter[str] = Counter()
    for parameter in parameters:
        counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else "float32"
