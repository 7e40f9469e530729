"""Replaying a block in backward: its own Python code runs again, on stand-ins, and only notes what it would do.

The code runs as in forward (same inputs, autocast, training mode), so that whatever it reads from its surroundings is
honoured, but each operation that matches the template only goes onto a tape. Afterwards every dropped value is computed
from the tape when backward asks for it. An operation that needs data (``item``, a mask) is computed at once; from the
first operation that does not match the template on, all of them are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memopt.offload.ambient import no_autocast
from memopt.offload.errors import ReplayError
from memopt.offload.operators import written_positions
from memopt.offload.replay.standin import StandIn, stand_in
from memopt.offload.replay.tape import Chain, Hole, Key, Node, Tape
from memopt.offload.replay.views import is_view, view_of
from memopt.offload.template import Layout, OpTemplate, Template
from memopt.offload.trees import operands_and_constants

_CAST = torch.ops.aten._to_copy.default
_local = threading.local()
_NO_NAMES: dict[str, Any] = {}


def replaying() -> bool:
    """Whether this thread is inside the replay of a block."""
    return getattr(_local, "depth", 0) > 0


def _laid_alike(tensors: list[Tensor], layouts: tuple[Layout | None, ...]) -> bool:
    """Whether operands have the shapes, strides and dtypes that they had when the operation was recorded."""
    if len(tensors) != len(layouts):
        return False
    for tensor, layout in zip(tensors, layouts, strict=True):
        if type(tensor) is StandIn and tensor.laid is layout:
            continue
        if layout is None or tensor.shape != layout.size or tensor.dtype != layout.dtype:
            return False
        if tensor.stride() != layout.stride:
            return False
    return True


class Reached(BaseException):
    """The last saved tensor that matters has been met; not an ``Exception``, so that blocks do not catch it."""


class Seen:
    """One saved tensor of the replay: a value of the tape, or a real tensor."""

    __slots__ = ("key", "layout", "tensor")

    def __init__(self, tensor: Tensor, wanted: bool) -> None:
        self.key: Key | None = None
        self.tensor: Tensor | None = None
        if type(tensor) is StandIn:
            self.layout = tensor.laid
            self.key = (tensor.chain, tensor.chain.version)
        else:
            self.layout = Layout.of(tensor)
            if wanted:
                self.tensor = tensor


class Replayer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The mode under which a block's forward runs again.

    Args:
        template: the call as it was recorded.
        tape: takes the operations.
        last_pack: the saved tensor after which to stop.
        wanted: the saved tensors, by number, that backward may ask for.
        sources: those whose values are there; of no others is noted what they are.
        eager: compute everything at once, from the first operation on.
        outside: the tensors that the block may read but, beyond what the template says, not overwrite.
    """

    def __init__(
        self,
        template: Template,
        tape: Tape,
        last_pack: int,
        wanted: set[int],
        sources: Iterable[int],
        eager: bool,
        outside: Callable[[], Iterable[Tensor]],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._wanted, self._noted = wanted, wanted.union(sources)
        self._outside = outside
        self.template, self.tape, self.last_pack, self.eager = template, tape, last_pack, eager
        self.seen: list[Seen | None] = []
        self._position = 0
        self._ops = template.ops
        self._ordinal = 0
        self._pretending = False
        self._casts: dict[tuple[int, Any], tuple[Layout, Chain]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Wrapping each dispatch to keep torch.compile out of it takes longer than the dispatch.
        return False

    def __enter__(self) -> Any:
        _local.depth = getattr(_local, "depth", 0) + 1
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        _local.depth -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def input_over(self, layout: Layout, chain: Chain, requires_grad: bool) -> Tensor:
        """A stand-in to pass to the block, not a leaf where it requires gradients: the block may overwrite it."""
        made: Tensor = stand_in(layout, chain)
        if requires_grad:
            self._pretending = True
            with self:
                made = made.requires_grad_().clone()
            self._pretending = False
        return made

    def pack(self, tensor: Tensor) -> None:
        """Saved-tensor hook of the replay; nothing is saved."""
        number = len(self.seen)
        self.seen.append(Seen(tensor, number in self._wanted) if number in self._noted else None)
        if len(self.seen) > self.last_pack:
            raise Reached

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or _NO_NAMES
        if self._pretending:
            return stand_in(args[0].laid, args[0].chain)
        known = self._expected(func)
        tensors = None if known is None or known.places is None else known.places.given(args, kwargs)
        if tensors is None:
            tensors, consts = operands_and_constants(args, kwargs)
            if known is not None and consts != known.constants:
                known = None
        if known is not None and not _laid_alike(tensors, known.layouts):
            known = None
        if known is None and not self.eager and is_view(func) and any(isinstance(t, StandIn) for t in tensors):
            # Autograd makes views again, where stand-ins leave it no other way to follow a write to a view.
            return view_of(func, args, kwargs, tensors)
        cast = (id(args[0]), kwargs.get("dtype")) if func is _CAST and type(args[0]) is nn.Parameter else None
        if known is None and not self.eager and cast is not None:
            # In forward, autocast's cache had the cast of this weight, from another tile or from another call, of which
            # autograd may hold it still.
            if cast not in self._casts:
                self._casts[cast] = self._cast(args, kwargs)
            return stand_in(*self._casts[cast])
        self._position += 1
        if known is None:
            self.eager = True
            return self._now(func, args, kwargs, tensors, None)
        if known.forced:
            return self._now(func, args, kwargs, tensors, known)
        output = self._later(func, args, kwargs, tensors, known)
        if cast is not None:
            self._casts[cast] = output.laid, output.chain
        return output

    def _cast(self, args: Any, kwargs: Any) -> tuple[Layout, Chain]:
        """A weight's cast, to be made only if nothing supplies it."""
        weight, device = args[0], kwargs.get("device") or args[0].device
        bare = torch.empty_strided(weight.size(), weight.stride(), dtype=weight.dtype, device="meta")
        layout = Layout.of(_CAST(bare, *args[1:], **{**kwargs, "device": None}))
        chain = Chain()
        self._node(_CAST, args, kwargs, [weight], (), [(0, chain)], False)
        return layout._replace(device=device), chain

    def _expected(self, func: Any) -> OpTemplate | None:
        """The operation that comes next, if it is this one."""
        if self.eager or self._position >= len(self._ops):
            return None
        known = self._ops[self._position]
        return known if known.func is func else None

    def _node(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        tensors: list[Tensor],
        written: tuple[int, ...],
        fresh: list[tuple[int, Chain]],
        random: bool,
        places: tuple[int, ...] | None = None,
    ) -> None:
        given: list[Hole | Tensor] = [
            Hole((t.chain, t.chain.version), t.laid) if type(t) is StandIn else t for t in tensors
        ]
        changed: list[Key] = []
        for position in written:
            tensor = tensors[position]
            if isinstance(tensor, StandIn) and (tensor.chain, tensor.chain.version) not in changed:
                tensor.chain.version += 1
                changed.append((tensor.chain, tensor.chain.version))
        ordinal = None
        if random:
            ordinal, self._ordinal = self._ordinal, self._ordinal + 1
        self.tape.add(Node(func, args, kwargs, given, fresh, changed, ordinal, places))

    def _later(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], known: OpTemplate) -> Any:
        if known.renames is not None:
            renamed, layout = tensors[known.renames], known.outputs[0].layout
            if type(renamed) is not StandIn or layout is None:
                return func(*args, **kwargs)
            return stand_in(layout, renamed.chain)
        fresh: list[tuple[int, Chain]] = []
        outputs: list[Any] = []
        for place, output in enumerate(known.outputs):
            if output.layout is None:
                outputs.append(tensors[output.position] if output.position is not None else output.constant)
            elif output.fresh:
                chain = Chain()
                fresh.append((place, chain))
                outputs.append(stand_in(output.layout, chain))
            else:
                base = tensors[output.position or 0]
                if not isinstance(base, StandIn):
                    # Another name for a real tensor costs nothing.
                    return func(*args, **kwargs)
                outputs.append(stand_in(output.layout, base.chain))
        if fresh or known.written:
            places = None if known.places is None else known.places.tensors
            self._node(func, args, kwargs, tensors, known.written, fresh, known.random, places)
        if known.container is None:
            return outputs[0]
        return outputs if known.container is list else tuple(outputs)

    def _now(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], known: OpTemplate | None) -> Any:
        """Compute an operation at once; its fresh outputs are real tensors from here on."""
        written = written_positions(func, args, kwargs, tensors)
        self._guard(func, [tensors[p] for p in written if not isinstance(tensors[p], StandIn)])
        random = known.random if known else torch.Tag.nondeterministic_seeded in func.tags
        stand_ins = any(isinstance(tensor, StandIn) for tensor in tensors)
        with no_autocast():
            if not stand_ins and not random:
                return func(*args, **kwargs)
            real_writes = tuple(p for p in written if isinstance(tensors[p], StandIn))
            self._node(func, args, kwargs, tensors, real_writes, [], random)
            output = self.tape.run(len(self.tape.nodes) - 1)
        return self._as_given(output, tensors, real_writes)

    def _guard(self, func: Any, written: list[Tensor]) -> None:
        """Refuse to overwrite what belongs to the outside; forward has done so once already."""
        if written:
            theirs = {tensor.untyped_storage()._cdata for tensor in self._outside()}
            for tensor in written:
                if tensor.untyped_storage()._cdata in theirs:
                    raise ReplayError(
                        f"{func} would overwrite a tensor of shape {tuple(tensor.shape)} from outside the block "
                        "again, which it did not do when the block first ran"
                    )

    @staticmethod
    def _as_given(output: Any, tensors: list[Tensor], written: tuple[int, ...]) -> Any:
        """Outputs that are, or lie over, a stand-in's storage must stay stand-ins: their chains know the writes."""
        chains = {}
        for tensor in tensors:
            if isinstance(tensor, StandIn):
                for version, value in tensor.chain.values.items():
                    if version == tensor.chain.version:
                        chains[value.untyped_storage()._cdata] = tensor

        def one(item: Any) -> Any:
            if not isinstance(item, Tensor):
                return item
            owner = chains.get(item.untyped_storage()._cdata)
            if owner is None:
                return item
            layout = Layout.of(item)
            for position in written:
                if Layout.of(tensors[position]) == layout:
                    return tensors[position]
            return stand_in(layout, owner.chain)

        if isinstance(output, (tuple, list)):
            return type(output)(one(item) for item in output)
        return one(output)
