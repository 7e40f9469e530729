"""The plain values that pass between trace, policy, placement, validation and the runtime.

Everything here is immutable, comparable and JSON-serialisable through ``dataclasses.asdict``. Times are indices of
operations in the traced step; a lifetime ``[birth, death)`` is half-open. Sizes are in bytes, durations in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Action(str, Enum):
    """What happens to a saved storage between forward and backward."""

    KEEP = "keep"
    SWAP = "swap"
    RECOMPUTE = "recompute"
    COMPRESS = "compress"

    __str__ = str.__str__


class Category(str, Enum):
    """What a storage is for, as the meter, the trace and the reports count it."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer_state"
    ACTIVATIONS = "activations"
    LOGITS = "logits_and_loss"
    TEMPORARIES = "temporaries"

    __str__ = str.__str__


class Phase(str, Enum):
    """The part of a training step in which an operation runs."""

    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"

    __str__ = str.__str__


class Status(str, Enum):
    """How a solver's answer stands: proven best, found but not proven, or nothing fits."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"

    __str__ = str.__str__


@dataclass(frozen=True)
class Storage:
    """One allocation: every tensor and view over it counts once.

    Attributes:
        id: its place in ``Trace.storages``.
        bytes: its size.
        category: what it is for.
        birth: the first operation during which it is alive.
        death: the first one after it during which it is not; the number of operations for what outlives the step.
        producer: the operation that made it, None for what was there before the step.
        name: of the parameter, or of the operation that made it.
    """

    id: int
    bytes: int
    category: Category
    birth: int
    death: int
    producer: int | None
    name: str


@dataclass(frozen=True)
class Op:
    """One operation of the traced step.

    Attributes:
        index: its place in ``Trace.ops``.
        name: of the operator.
        phase: the part of the step.
        block: the block call that it belongs to, by its place in ``Trace.blocks``, or None.
        flops: of products and attention.
        bytes_read: from its inputs.
        bytes_written: to its outputs.
        reads: ids of storages.
        writes: ids of storages.
        random: whether it draws random numbers.
    """

    index: int
    name: str
    phase: Phase
    block: int | None
    flops: int
    bytes_read: int
    bytes_written: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    random: bool = False


@dataclass(frozen=True)
class SavedStorage:
    """A ``storage`` of some ``bytes``, made by operation ``producer``, that autograd saves inside one call of a block.

    ``index`` counts the call's distinct saved storages in the order in which autograd first packs them, leaving out
    parameters, buffers and the storages of the block's inputs: trace and runtime see the same order. ``dtype`` is that
    of the tensor that autograd packed first, "" where it is not known. ``token_wise`` says that it can be cut along
    tokens. ``let_go`` is the first operation before which nobody but autograd holds it any more: variables of a forward
    that still runs hold what no operation reads again. 0 where that is not known.
    """

    index: int
    storage: int
    bytes: int
    producer: int
    token_wise: bool
    dtype: str = ""
    let_go: int = 0


@dataclass(frozen=True)
class Block:
    """One call of a repeated module. Blocks of one ``group`` have the same operations, shapes and saved storages.

    ``call`` counts the module's calls in one forward of the model, so that where gradients are accumulated every pass
    has a block of the same path and call, and all of them run under one plan.

    ``saved_inputs`` are the storages of the call's inputs that autograd saves inside it, in the order in which it first
    packs them, with numbers of their own; ``saved`` leaves them out. ``forward`` and ``backward`` are half-open ranges
    of operations, ``inputs`` and ``outputs`` ids of storages; ``signature`` is a hash of what runs in the block.
    """

    path: str
    call: int
    group: int
    forward: tuple[int, int]
    backward: tuple[int, int]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    saved: tuple[SavedStorage, ...]
    signature: str
    saved_inputs: tuple[SavedStorage, ...] = ()


@dataclass(frozen=True)
class Tile:
    """The module at ``path`` runs in at most ``chunks`` tiles of its first argument along ``dim``."""

    path: str
    chunks: int
    dim: int


@dataclass(frozen=True)
class Trace:
    """One training step of a model: what runs, what it allocates, and what backward needs.

    Attributes:
        model: its name.
        ops: every operation, in the order in which they run.
        storages: every allocation.
        blocks: every call of a repeated module.
        peak_bytes: most bytes alive at once.
        dtype: of weights and activations.
        meta: what else is known, by name.
        tiles: modules that ran in tiles, because the trace was asked to.
    """

    model: str
    ops: tuple[Op, ...]
    storages: tuple[Storage, ...]
    blocks: tuple[Block, ...]
    peak_bytes: int
    dtype: str
    meta: dict[str, str | int | float] = field(default_factory=dict)
    tiles: tuple[Tile, ...] = ()


@dataclass(frozen=True)
class StorageAction:
    """The ``action`` on the saved storage of this ``index`` and ``bytes``, or on a ``fraction`` of it.

    ``format`` is that of a compressed storage.

    The shares of a storage add up to 1. Kept and swapped shares are bytes: the first ``moved_bytes`` leave, the rest
    waits in a smaller buffer. A recomputed share below 1 is one of rows, for blocks that run in tiles.
    """

    index: int
    bytes: int
    action: Action
    fraction: float = 1.0
    format: str | None = None


@dataclass(frozen=True)
class BlockPlan:
    """The actions of one ``call`` of the block at ``path``; the runtime checks ``signature``.

    ``actions`` go by the index of ``Block.saved``, ``inputs`` by that of ``Block.saved_inputs``. Inputs can be kept or
    swapped (out when the block's forward has ended, back at its first replay at the latest) and are kept where not
    named; a swapped one is saved by no other block call and used by no other operation of backward.
    """

    path: str
    call: int
    signature: str
    actions: tuple[StorageAction, ...]
    inputs: tuple[StorageAction, ...] = ()


SPLIT_BYTES = 512


def moved_bytes(size: int, fraction: float) -> int:
    """The bytes that leave when a share of a storage is swapped: a whole number of 512 bytes, or all of them."""
    return size if fraction >= 1 else int(size * fraction) // SPLIT_BYTES * SPLIT_BYTES
