"""What one device holds of a traced step when the step is spread over several: a trace in, a trace out.

Degrees multiply: ``data`` x ``tensor`` x ``context`` devices. With ``b`` the bytes of a storage before:

- tensor parallel (with sequence parallel, as Megatron does it): matrices, their gradients and state b/t, vectors whole;
  activations, logits and temporaries b/t; beside them each block gathers its whole input while it runs.
- context parallel (ring attention): activations, logits, temporaries b/c; two pieces of keys and values under way.
- ZeRO 1: optimizer state b/d. ZeRO 2: gradients too, each whole until its block's backward is over. ZeRO 3 (FSDP2):
  parameters too; what is gathered and copied beside the shards is told in ``fsdp``. Buffers are whole everywhere.

FLOPs and bytes of forward, loss and backward are divided by t*c, those of the optimizer by t and by d from ZeRO 1 on.
The communication itself is not timed.
"""

from __future__ import annotations

from dataclasses import replace

from memopt.planner.sharding import fsdp
from memopt.planner.sharding.buffers import context_buffers, tensor_buffers, whole_gradients
from memopt.planner.sharding.degrees import Degrees
from memopt.planner.values import Category, Op, Phase, SavedStorage, Storage, Trace

_PER_TOKEN = (Category.ACTIVATIONS, Category.LOGITS, Category.TEMPORARIES)


def shard(trace: Trace, degrees: Degrees) -> Trace:
    """The step of one device.

    Args:
        trace: of the whole step with the batch that one data-parallel rank has.
        degrees: how it is spread.
    """
    scales = _scales(trace, degrees)
    extra = [*tensor_buffers(trace, degrees), *context_buffers(trace, degrees)]
    births: dict[int, int | None] = {}
    if degrees.data > 1 and degrees.zero == 2:
        extra += whole_gradients(trace, degrees, scales)
    if degrees.data > 1 and degrees.zero == 3:
        tensor_only = replace(degrees, data=1)
        unsharded = replace(trace, storages=tuple(_resized(trace.storages, _scales(trace, tensor_only))))
        whole = {s.id: s.bytes for s in unsharded.storages if _is_parameter(s)}
        births, gradients = fsdp.reduced_gradients(unsharded)
        extra += [*gradients, *fsdp.gathered_parameters(unsharded, whole)]
    storages = [fsdp.born_when_reduced(storage, births) for storage in _resized(trace.storages, scales)]
    for one in extra:
        if one.birth < one.death and one.bytes:
            storages.append(Storage(len(storages), one.bytes, one.category, one.birth, one.death, None, one.name))
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


def _resized(storages: tuple[Storage, ...], scales: dict[int, float]) -> list[Storage]:
    return [replace(s, bytes=_divided(s.bytes, scales[s.id])) for s in storages]


def _divided(size: int, scale: float) -> int:
    return size if scale == 1 else -int(-size * scale // 1)


def _is_parameter(storage: Storage) -> bool:
    return storage.category is Category.WEIGHTS and not storage.name.startswith("buffer ")


def _matrices(trace: Trace) -> set[int]:
    """Weights that matrix products or embeddings read; tensor parallelism splits these."""
    found: set[int] = set()
    weights = {storage.id for storage in trace.storages if _is_parameter(storage)}
    for op in trace.ops:
        if op.flops or "embedding" in op.name:
            found.update(weights.intersection(op.reads))
    return found


def _scales(trace: Trace, degrees: Degrees) -> dict[int, float]:
    """The share of each storage that one device holds; gradients and state shrink as the parameters do on the whole."""
    matrices = _matrices(trace)
    parameters = [storage for storage in trace.storages if _is_parameter(storage)]
    before = sum(storage.bytes for storage in parameters)
    split = sum(storage.bytes for storage in parameters if storage.id in matrices)
    kept = 1.0 if not before else 1 - split / before * (1 - 1 / degrees.tensor)
    share = 1 / degrees.data
    stepping = {op.index for op in trace.ops if op.phase is Phase.OPTIMIZER}
    scales = {}
    for storage in trace.storages:
        scale = 1.0
        if _is_parameter(storage):
            scale = (1 / degrees.tensor if storage.id in matrices else 1.0) * (share if degrees.zero >= 3 else 1)
        elif storage.category is Category.GRADIENTS:
            scale = kept * (share if degrees.zero >= 2 else 1)
        elif storage.category is Category.OPTIMIZER or storage.producer in stepping:
            scale = kept * (share if degrees.zero >= 1 else 1)
        elif storage.category in _PER_TOKEN:
            scale = 1 / (degrees.tensor * degrees.context)
        scales[storage.id] = scale
    return scales


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
