"""What else a training step can do without, as traces derived from its trace: from values to values, no second trace.

Every change is stated with what it does to bytes and seconds. They are estimates of steps that have not been traced; a
choice made here is traced again before it is applied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from memopt.planner.devices import Rates
from memopt.planner.values import Category, Phase, SavedStorage, Storage, Trace

LOSS_CHUNK_BYTES = 84 * 2**20  # memopt.linear_cross_entropy's scratch unless told otherwise

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Change:
    """One change of a step: its effect on the trace, the seconds it adds, whether training itself is changed by it.

    ``how`` says in a few words what makes it in a training script.
    """

    name: str
    how: str
    apply: Callable[[Trace], Trace]
    seconds: Callable[[Trace, Rates], float] = lambda trace, rates: 0.0
    changes_training: bool = False


def _resized(trace: Trace, size: Callable[[Storage], int]) -> Trace:
    storages = tuple(replace(s, bytes=size(s)) for s in trace.storages)
    by_id = {s.id: s.bytes for s in storages}

    def saved(ones: tuple[SavedStorage, ...]) -> tuple[SavedStorage, ...]:
        return tuple(replace(one, bytes=by_id[one.storage]) for one in ones)

    blocks = tuple(replace(b, saved=saved(b.saved), saved_inputs=saved(b.saved_inputs)) for b in trace.blocks)
    return _with_peak(replace(trace, storages=storages, blocks=blocks))


def live_bytes(trace: Trace) -> Ints:
    """Bytes that are there at every operation of the plain step."""
    length = len(trace.ops)
    change = np.zeros(length + 1, dtype=np.int64)
    births = np.array([min(max(s.birth, 0), length) for s in trace.storages], dtype=np.int64)
    deaths = np.array([min(max(s.death, 0), length) for s in trace.storages], dtype=np.int64)
    sizes = np.array([s.bytes for s in trace.storages], dtype=np.int64)
    np.add.at(change, births, sizes)
    np.add.at(change, deaths, -sizes)
    return np.cumsum(change)


def _with_peak(trace: Trace) -> Trace:
    return replace(trace, peak_bytes=int(live_bytes(trace).max()))


def state_bits(name: str, share: float) -> Change:
    """An optimizer state of ``share`` of the traced one's bytes."""

    def apply(trace: Trace) -> Trace:
        return _resized(trace, lambda s: int(s.bytes * share) if s.category is Category.OPTIMIZER else s.bytes)

    return Change(name, "an optimizer of memopt.optim with that state", apply)


def release_gradients() -> Change:
    """Every gradient goes when backward has finished with it, because its parameter is updated right then."""

    def apply(trace: Trace) -> Trace:
        last = {s: op.index + 1 for op in trace.ops if op.phase is Phase.BACKWARD for s in (*op.reads, *op.writes)}
        storages = tuple(
            replace(s, death=min(s.death, last.get(s.id, s.death))) if s.category is Category.GRADIENTS else s
            for s in trace.storages
        )
        return _with_peak(replace(trace, storages=storages))

    return Change("gradients released", "memopt.optim.release_gradients(optimizer)", apply)


def chunked_loss() -> Change:
    """Logits exist one chunk of rows at a time, so that all there is of them takes at most ``LOSS_CHUNK_BYTES``."""

    def apply(trace: Trace) -> Trace:
        logits = replace(trace, storages=tuple(s for s in trace.storages if s.category is Category.LOGITS))
        share = min(1.0, LOSS_CHUNK_BYTES / max(1, int(live_bytes(logits).max())))
        return _resized(trace, lambda s: int(s.bytes * share) if s.category is Category.LOGITS else s.bytes)

    return Change("chunked loss", "memopt.linear_cross_entropy or memopt.integrations.fuse_loss(model)", apply)


def offload_state() -> Change:
    """The optimizer state waits in host memory and passes through the link once each way in every step."""

    def apply(trace: Trace) -> Trace:
        return _resized(trace, lambda s: 0 if s.category is Category.OPTIMIZER else s.bytes)

    def seconds(trace: Trace, rates: Rates) -> float:
        state = sum(s.bytes for s in trace.storages if s.category is Category.OPTIMIZER)
        if rates.tier == "none" or state > rates.host_bytes:
            return float("inf")
        return state / rates.swap_out_bytes_per_second + state / rates.swap_in_bytes_per_second

    return Change("optimizer state in host memory", "memopt.offload.HostOptimizer", apply, seconds)


def one_block_at_a_time() -> Change:
    """Block-coordinate coverage: only one block's parameters have gradients and state at a time."""

    def apply(trace: Trace) -> Trace:
        share = max(1, len(trace.blocks))
        held = (Category.GRADIENTS, Category.OPTIMIZER)
        return _resized(trace, lambda s: s.bytes // share if s.category in held else s.bytes)

    return Change("block-coordinate updates", "memopt.optim.BlockCoordinate", apply, changes_training=True)


STATES = {"8bit state": 8.125, "4bit state": 4.25}
"""Bits of each number of optimizer state, scales included, in the formats that a change may take."""

_PLAIN = (chunked_loss, release_gradients, offload_state, one_block_at_a_time)


def change(name: str, traced_bits: float = 32.0) -> Change:
    """A change by its name, for a trace whose optimizer keeps so many bits for each number of state.

    Raises:
        ValueError: an unknown name.
    """
    if name in STATES:
        return state_bits(name, STATES[name] / traced_bits)
    known = {one.name: one for one in (make() for make in _PLAIN)}
    if name not in known:
        raise ValueError(f"change {name!r} is unknown; choose {', '.join((*known, *STATES))}")
    return known[name]
