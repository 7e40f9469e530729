"""Carries a plan out on eager PyTorch, exactly: ``apply(model, plan)``.

Each planned block's forward runs with one pair of saved-tensor hooks around it, and nothing else; what autograd wants
to save is handed over in a fixed order, and the plan says for each distinct storage among it what becomes of it. In
backward, a storage comes back when its first consumer asks for it. The first call of each kind (shapes, training mode)
is recorded while it really runs, under a dispatch mode.

When memory is held
===================
Notation: a block call saves storages s1, s2, ... (in order of first pack, without parameters, buffers and the storages
of the block's inputs, which autograd holds as without a plan). *Pack* is the moment at which autograd saves a tensor,
*unpack* the moment at which the backward of the operation that saved it starts, *done* the moment at which that
operation's backward has finished. Everything is freed by reference counting; nothing waits for the garbage collector.

Keep
    As without a plan: until the last of the storage's tensors is done. Longer only for a *source*: a kept storage that
    the replay of a recomputed storage r of the same call reads is also held until the last tensor over r is done.
Swap, tiers ``disk`` and (without CUDA) ``host``
    Copied out synchronously at its first pack, so the storage dies as soon as forward itself drops it: never earlier
    than without a plan, and no staging buffer on the device. Copied in synchronously, into a new allocation of the
    storage's bytes, at its first unpack, or earlier when a replay reads it. Held until its last tensor has been
    unpacked and is done. There is no prefetch: one new buffer at a time.
Swap, a share of a storage
    The first bytes go, a whole number of 512; the rest is copied to a buffer of its own when the first bytes go, and
    held there until the first unpack, when a whole storage is allocated and filled from both.
Swap, inputs of the block
    Autograd's hold on them, and that of the replays, ends when the block's forward has returned: copied out then, back
    at the first unpack or the block's first replay, and held until neither needs them. Other holders are not asked.
Swap, tier ``host`` on CUDA
    The copy out runs on its own stream; the storage is held until the forward of the next planned block has ended,
    where compute waits for the copy if need be, or earlier where more than ``in_flight_bytes`` are on their way. At an
    unpack the storages swapped before it are fetched ahead, ``prefetch_bytes`` at
    most: that is the most that is held earlier than needed.
Recompute
    Dropped at pack; dies when forward drops it. While any recomputed storage of a call is pending, the call holds all
    of its tensor inputs that are not swapped (every tensor argument of the block, whether the replay reads it or not;
    of what hangs deeper in arguments, such as caches, only the tensors that the call read), copies of the small
    buffers that the block overwrites (batch norm's statistics), and copies of inputs that it overwrites in place and
    the replay needs.
    At the first unpack of any of them the block's Python code runs again on tensors without data. This allocates
    nothing and computes nothing, unless the code asks for data (``item``, a mask). Then, at each unpack of a recomputed
    storage r that is not there yet, the operations in its cone that have not run yet run, in forward order. So each
    operation in the union of the cones runs at most once per backward, as late as possible: for the first unpack of
    r, not all at once. A value made by such an operation is held while an operation of the union that has not run yet
    reads it, or while it is itself a recomputed storage with tensors not yet unpacked; then it is freed, also in the
    middle of a cone. Outputs of an operation that nobody needs die when it returns. An operation in place takes over
    the buffer of the value before it when nobody else needs that one, and works on a copy otherwise. A cone ends at
    kept and swapped storages, parameters, buffers and block inputs, never at compressed storages, which are recomputed
    where a cone needs them.
    r is freed when its last tensor has been unpacked and that operation is done.
    Random operations in a cone draw what they drew in forward. On the CPU a random operation that is not in the cone
    but precedes one that is runs on a dummy of its operand's bytes, once, and the dummy dies when it returns.
Compress
    The copy in codes is made at first pack and held until the last tensor over the storage is done; the storage itself
    dies as under swap. At the first unpack it is decoded into a new allocation of the storage's bytes, held as under
    swap.
The first step
    Is recorded while the plan is already in force, so its peak is that of later steps; beside bookkeeping, it holds
    copies of buffers and inputs that the block overwrites, until the block returns. The first call of each further kind
    (other shapes, another mode) keeps everything it saves, once.
Under autocast
    A block that is called once a step runs without autocast's cache of weights, which would hold the casts of weights
    that the block drops until autocast ends. Blocks called several times share their casts, as without a plan; these
    are then held until autocast ends, whatever the plan says.
``no_grad``, evaluation
    Nothing happens at all.
"""

from memopt.offload.applying import Handle, apply
from memopt.offload.errors import PlanMismatchError, ReplayError, SwapError, UnsupportedBlockError
from memopt.offload.reporting import StepReport
from memopt.offload.reversible import Reversible
from memopt.offload.states.host_optimizer import HostOptimizer
from memopt.offload.states.paged_optimizer import PagedOptimizer
from memopt.offload.static.arena import Arena
from memopt.offload.tiling import Tiled, blockwise_attention, tile

__all__ = [
    "Arena",
    "Handle",
    "HostOptimizer",
    "PagedOptimizer",
    "PlanMismatchError",
    "ReplayError",
    "Reversible",
    "StepReport",
    "SwapError",
    "Tiled",
    "UnsupportedBlockError",
    "apply",
    "blockwise_attention",
    "tile",
]
