"""What a device holds beside its share of the step: inputs gathered, keys and values under way, whole gradients."""

from __future__ import annotations

from dataclasses import dataclass

from memopt.planner.sharding.degrees import Degrees
from memopt.planner.values import Category, Trace


@dataclass(frozen=True)
class Extra:
    """Bytes that are there before operations ``birth`` to ``death``, half-open."""

    birth: int
    death: int
    bytes: int
    category: Category
    name: str


def tensor_buffers(trace: Trace, degrees: Degrees) -> list[Extra]:
    """Each block's whole input, gathered from the ranks that split its tokens, while the block runs."""
    if degrees.tensor == 1:
        return []
    by_id = {storage.id: storage for storage in trace.storages}
    found: list[Extra] = []
    for block in trace.blocks:
        inputs = [by_id[i].bytes for i in block.inputs if by_id[i].category is not Category.WEIGHTS]
        size = max(inputs, default=0) // degrees.context
        for start, stop in (block.forward, block.backward):
            found.append(Extra(start, stop, size, Category.TEMPORARIES, f"gathered input of {block.path}"))
    return found


def context_buffers(trace: Trace, degrees: Degrees) -> list[Extra]:
    """Two pieces of keys and values, one in use and one on its way, around each attention operation."""
    if degrees.context == 1:
        return []
    found: list[Extra] = []
    for op in trace.ops:
        if "attention" in op.name and op.flops and op.phase.value != "optimizer":
            pieces = max(0, op.bytes_read - op.bytes_written) // (degrees.context * degrees.tensor)
            found.append(Extra(op.index, op.index + 1, 2 * pieces, Category.TEMPORARIES, "keys and values under way"))
    return found


def whole_gradients(trace: Trace, degrees: Degrees, scales: dict[int, float]) -> list[Extra]:
    """ZeRO 2: the rest of each gradient until its block's backward is over and it is reduced."""
    found: list[Extra] = []
    for storage in trace.storages:
        if storage.category is Category.GRADIENTS and storage.producer is not None:
            op = trace.ops[storage.producer]
            stop = trace.blocks[op.block].backward[1] if op.block is not None else storage.birth + 1
            rest = round(storage.bytes * scales[storage.id] * (degrees.data - 1))
            stop = max(stop, storage.birth + 1)
            found.append(Extra(storage.birth, stop, rest, Category.GRADIENTS, "whole gradient"))
    return found
