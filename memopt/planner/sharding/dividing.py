"""What one device holds of a traced step when the step is spread over several: a trace in, a trace out.

Degrees multiply: ``data`` x ``tensor`` x ``context`` devices. With ``b`` the bytes of a storage before:

- tensor parallel (with sequence parallel, as Megatron does it): matrices, their gradients and state b/t, vectors whole;
  activations, logits and temporaries b/t; beside them each block gathers its whole input while it runs.
- context parallel (ring attention): activations, logits, temporaries b/c; two pieces of keys and values under way.
- ZeRO 1: optimizer state b/d. ZeRO 2: gradients too, each whole until its block's backward is over. ZeRO 3 (FSDP):
  weights too; a block's weights are whole from one block before it runs until it has run, in forward and in backward,
  those outside blocks from their first use to their last.

FLOPs and bytes of forward, loss and backward are divided by t*c, those of the optimizer by t and by d from ZeRO 1 on.
The communication itself is not timed.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from memopt.planner.values import Block, Category, Op, Phase, SavedStorage, Storage, Trace

_PER_TOKEN = (Category.ACTIVATIONS, Category.LOGITS, Category.TEMPORARIES)


@dataclass(frozen=True)
class Degrees:
    """How a step is spread: devices along data, tensor and context, and the ZeRO stage (0 to 3)."""

    data: int = 1
    tensor: int = 1
    context: int = 1
    zero: int = 0

    def __post_init__(self) -> None:
        for name in ("data", "tensor", "context"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of devices, at least 1, not {value!r}")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero must be 0, 1, 2 or 3, not {self.zero!r}")

    @property
    def devices(self) -> int:
        """Devices in all."""
        return self.data * self.tensor * self.context


def shard(trace: Trace, degrees: Degrees) -> Trace:
    """The step of one device.

    Args:
        trace: of the whole step with the batch that one data-parallel rank has.
        degrees: how it is spread.
    """
    scales = _scales(trace, degrees)
    storages = [replace(s, bytes=_divided(s.bytes, scales[s.id])) for s in trace.storages]
    extra = [
        *_tensor_buffers(trace, degrees),
        *_context_buffers(trace, degrees),
        *_zero_buffers(trace, degrees, scales),
    ]
    for birth, death, size, category, name in extra:
        storages.append(Storage(len(storages), size, category, birth, death, None, name))
    by_id = {storage.id: storage for storage in storages}

    def resized(saved: tuple[SavedStorage, ...]) -> tuple[SavedStorage, ...]:
        return tuple(replace(one, bytes=by_id[one.storage].bytes) for one in saved)

    blocks = tuple(replace(b, saved=resized(b.saved), saved_inputs=resized(b.saved_inputs)) for b in trace.blocks)
    return replace(
        trace,
        ops=tuple(_divided_op(op, degrees) for op in trace.ops),
        storages=tuple(storages),
        blocks=blocks,
        peak_bytes=_peak(storages, len(trace.ops)),
        meta={
            **trace.meta,
            "data": degrees.data,
            "tensor": degrees.tensor,
            "context": degrees.context,
            "zero": degrees.zero,
        },
    )


def _divided(size: int, scale: float) -> int:
    return size if scale == 1 else -int(-size * scale // 1)


def _matrices(trace: Trace) -> set[int]:
    """Weights that matrix products or embeddings read; tensor parallelism splits these."""
    found: set[int] = set()
    weights = {storage.id for storage in trace.storages if storage.category is Category.WEIGHTS}
    for op in trace.ops:
        if op.flops or "embedding" in op.name:
            found.update(weights.intersection(op.reads))
    return found


def _scales(trace: Trace, degrees: Degrees) -> dict[int, float]:
    """The share of each storage that one device holds; gradients and state shrink as the weights do on the whole."""
    matrices = _matrices(trace)
    weights = [storage for storage in trace.storages if storage.category is Category.WEIGHTS]
    before = sum(storage.bytes for storage in weights)
    split = sum(storage.bytes for storage in weights if storage.id in matrices)
    kept = 1.0 if not before else 1 - split / before * (1 - 1 / degrees.tensor)
    share = 1 / degrees.data
    stepping = {op.index for op in trace.ops if op.phase is Phase.OPTIMIZER}
    scales = {}
    for storage in trace.storages:
        scale = 1.0
        if storage.category is Category.WEIGHTS:
            scale = (1 / degrees.tensor if storage.id in matrices else 1.0) * (share if degrees.zero >= 3 else 1)
        elif storage.category is Category.GRADIENTS:
            scale = kept * (share if degrees.zero >= 2 else 1)
        elif storage.category is Category.OPTIMIZER or storage.producer in stepping:
            scale = kept * (share if degrees.zero >= 1 else 1)
        elif storage.category in _PER_TOKEN:
            scale = 1 / (degrees.tensor * degrees.context)
        scales[storage.id] = scale
    return scales


Extra = tuple[int, int, int, Category, str]


def _tensor_buffers(trace: Trace, degrees: Degrees) -> list[Extra]:
    """Each block's whole input, gathered from the ranks that split its tokens, while the block runs."""
    if degrees.tensor == 1:
        return []
    by_id = {storage.id: storage for storage in trace.storages}
    found: list[Extra] = []
    for block in trace.blocks:
        inputs = [by_id[i].bytes for i in block.inputs if by_id[i].category is not Category.WEIGHTS]
        size = max(inputs, default=0) // degrees.context
        for start, stop in _runs(block):
            found.append((start, stop, size, Category.TEMPORARIES, f"gathered input of {block.path}"))
    return found


def _context_buffers(trace: Trace, degrees: Degrees) -> list[Extra]:
    """Two pieces of keys and values, one in use and one on its way, around each attention operation."""
    if degrees.context == 1:
        return []
    found: list[Extra] = []
    for op in trace.ops:
        if "attention" in op.name and op.flops and op.phase is not Phase.OPTIMIZER:
            pieces = max(0, op.bytes_read - op.bytes_written) // (degrees.context * degrees.tensor)
            found.append((op.index, op.index + 1, 2 * pieces, Category.TEMPORARIES, "keys and values under way"))
    return found


def _zero_buffers(trace: Trace, degrees: Degrees, scales: dict[int, float]) -> list[Extra]:
    """What ZeRO 2 and 3 hold whole for a while."""
    if degrees.data == 1 or degrees.zero < 2:
        return []
    found = _whole_gradients(trace, degrees, scales)
    return found if degrees.zero == 2 else found + _whole_weights(trace, degrees, scales)


def _whole_gradients(trace: Trace, degrees: Degrees, scales: dict[int, float]) -> list[Extra]:
    found: list[Extra] = []
    for storage in trace.storages:
        if storage.category is Category.GRADIENTS and storage.producer is not None:
            op = trace.ops[storage.producer]
            stop = trace.blocks[op.block].backward[1] if op.block is not None else storage.birth + 1
            rest = round(storage.bytes * scales[storage.id] * (degrees.data - 1))
            found.append((storage.birth, max(stop, storage.birth + 1), rest, Category.GRADIENTS, "whole gradient"))
    return found


def _whole_weights(trace: Trace, degrees: Degrees, scales: dict[int, float]) -> list[Extra]:
    weights = {storage.id: storage for storage in trace.storages if storage.category is Category.WEIGHTS}
    users: defaultdict[int, set[int | None]] = defaultdict(set)
    uses: defaultdict[int, list[int]] = defaultdict(list)
    for op in trace.ops:
        if op.phase is not Phase.OPTIMIZER:
            for storage in weights.keys() & set(op.reads):
                users[storage].add(op.block)
                uses[storage].append(op.index)
    whole = {i: round(weights[i].bytes * scales[i] * (degrees.data - 1)) for i in users}
    outside = [i for i, blocks in users.items() if len(blocks) != 1 or None in blocks]
    found: list[Extra] = [
        (min(uses[i]), max(uses[i]) + 1, whole[i], Category.TEMPORARIES, "gathered weights outside blocks")
        for i in outside
    ]
    in_forward = sorted(range(len(trace.blocks)), key=lambda number: trace.blocks[number].forward)
    in_backward = sorted(range(len(trace.blocks)), key=lambda number: trace.blocks[number].backward)
    for order, run in ((in_forward, 0), (in_backward, 1)):
        for place, number in enumerate(order):
            block = trace.blocks[number]
            before = trace.blocks[order[place - 1]] if place else block
            size = sum(whole[i] for i, blocks in users.items() if blocks == {number})
            start, stop = _runs(before)[run][0], _runs(block)[run][1]
            found.append((start, stop, size, Category.TEMPORARIES, f"gathered weights of {block.path}"))
    return found


def _runs(block: Block) -> tuple[tuple[int, int], tuple[int, int]]:
    return block.forward, block.backward


def _divided_op(op: Op, degrees: Degrees) -> Op:
    if op.phase is Phase.OPTIMIZER:
        parts = degrees.tensor * (degrees.data if degrees.zero else 1)
    else:
        parts = degrees.tensor * degrees.context
    return replace(
        op, flops=op.flops // parts, bytes_read=op.bytes_read // parts, bytes_written=op.bytes_written // parts
    )


def _peak(storages: list[Storage], length: int) -> int:
    changes = [0] * (max(1, length) + 1)
    for storage in storages:
        if storage.birth < storage.death:
            changes[min(storage.birth, length)] += storage.bytes
            changes[min(storage.death, length)] -= storage.bytes
    level = peak = 0
    for change in changes[: max(1, length)]:
        level += change
        peak = max(peak, level)
    return peak
