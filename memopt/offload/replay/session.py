"""One block call's replays: when they start, what they start from, and when their values die."""

from __future__ import annotations

import contextlib
import threading
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from memopt.offload.ambient import attributes_restored, autocast, no_autocast
from memopt.offload.arguments import Absent, Away
from memopt.offload.errors import ReplayError
from memopt.offload.handles import Kept, Piece
from memopt.offload.origin import Origin
from memopt.offload.partitioned import stand_ins_for_parameters
from memopt.offload.replay.cones import Needs
from memopt.offload.replay.draws import Draws
from memopt.offload.replay.replaying import Reached, Replayer, Seen
from memopt.offload.replay.tape import Chain, Tape
from memopt.offload.template import Kind, Layout, Template


class Sessions:
    """The replays of one block call: one for each time that backward runs through it.

    Args:
        origin: where the call started.
    """

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.template: Template | None = None
        self.needs = Needs()
        self.dropped: list[ref[Dropped]] = []
        self.sources: dict[int, ref[Kept | Piece]] = {}
        self._lock = threading.RLock()
        self._tape: Tape | None = None
        self._seen: list[Seen | None] = []
        self._waiting: set[int] = set()

    def unpack(self, number: int, expected: Layout) -> Tensor:
        """The value of a dropped saved tensor, by its number in the call."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            with torch.no_grad(), no_autocast():
                return self.unpack(number, expected)
        with self._lock:
            try:
                return self._value(number, expected)
            except BaseException:
                self._close()
                raise

    def _value(self, number: int, expected: Layout) -> Tensor:
        if number not in self._waiting:
            self._close()
        if self._tape is None:
            self._replay()
        assert self._tape is not None
        seen = self._seen[number] if number < len(self._seen) else None
        if seen is None or (seen.layout is not expected and seen.layout != expected):
            found = "nothing" if seen is None else f"{seen.layout}"
            raise ReplayError(
                f"block {self.origin.where} saved {expected} as its tensor {number} in forward, and {found} in its "
                "replay: its forward depends on something that changes between calls; keep it out of the plan"
            )
        if seen.key is None:
            assert seen.tensor is not None
            value = seen.tensor.detach()
        else:
            try:
                value = seen.layout.over(self._tape.get(seen.key))
            except LookupError as error:
                raise ReplayError(
                    f"block {self.origin.where} cannot be replayed: its backward needs {error.args[0]}; it did "
                    "something else when it first ran. Keep it out of the plan"
                ) from error
            self._tape.release(seen.key)
        self._waiting.discard(number)
        seen.tensor = None
        if not self._waiting:
            self._close()
        return value

    def _close(self) -> None:
        if self._tape is not None:
            self._tape.clear()
            for held in self.origin.arguments.held:
                if isinstance(held, Away):
                    held.release()
        self._tape, self._seen, self._waiting = None, [], set()

    def _replay(self) -> None:
        assert self.template is not None
        self.origin.check()
        self._waiting = {d.number for r in self.dropped if (d := r()) is not None}
        counts, opaque = self.origin.counts, self.template.opaque
        counts.replays += 1
        try:
            strayed = self._run(eager=opaque is not None)
            reason = opaque or ("its operations differ from those recorded" if strayed else None)
        except Exception as error:
            if opaque is not None:
                raise
            # Something looked at data behind the dispatcher: bring everything back the plain way.
            reason = f"{type(error).__name__}: {error}"
            self._run(eager=True)
        if reason is not None:
            counts.whole += 1
            counts.reasons.add(f"block {self.origin.where}: {reason}")
        assert self._tape is not None
        self._supply()
        seen = [self._seen[n] for n in sorted(self._waiting) if n < len(self._seen)]
        self._tape.expect([one.key for one in seen if one is not None and one.key is not None])

    def _supply(self) -> None:
        """Tell the tape which values kept and swapped storages hold."""
        for number, reference in self.sources.items():
            handle = reference()
            if handle is None or number >= len(self._seen):
                continue
            seen = self._seen[number]
            if seen is not None and seen.key is not None and not seen.key[0].available(seen.key[1]):
                chain, version = seen.key
                if isinstance(handle, Kept):
                    if Layout.of(handle.tensor).dtype == seen.layout.dtype:
                        chain.loaders[version] = handle.unpack
                else:
                    chain.loaders[version] = handle.peek

    def _run(self, eager: bool) -> bool:
        """Run the block's code on the tape; returns whether it left the template."""
        assert self.template is not None
        origin, template = self.origin, self.template
        tape = Tape(Draws(origin.generators, origin.states, [op.rng_offset for op in template.ops if op.random]))
        tape.stale, tape.where = origin.overwritten(), origin.where
        if eager and tape.stale:
            raise tape.overwritten()
        replayer = Replayer(
            template,
            tape,
            max(self.needs.last_pack, *self._waiting),
            self._waiting,
            self.sources,
            eager,
            self._outside,
        )
        self._tape, self._seen = tape, replayer.seen
        args, kwargs = self._arguments(replayer)
        with attributes_restored(origin.block, origin.training), autocast(origin.autocast), torch.enable_grad():
            self._swap_buffers(replayer)
            if origin.partitioned:
                self._swap_parameters(replayer)
            with replayer, saved_tensors_hooks(replayer.pack, _never), contextlib.suppress(Reached):
                origin.forward(*args, **kwargs)
        return replayer.eager

    def _outside(self) -> list[Tensor]:
        block, held = self.origin.block, self.origin.arguments.held
        return [*(h for h in held if isinstance(h, Tensor)), *self.origin.parameters, *block.buffers()]

    def _chain(self, storage: int, physical: Tensor) -> Chain:
        """The chain of a storage that the call overwrote: its copy from before, and what it holds now."""
        assert self.template is not None
        chain, copy = Chain(), self.origin.copies.get(storage)
        if copy is not None:
            chain.values[0] = copy
        if self.template.kinds[storage] is not Kind.BUFFER:
            chain.loaders[self.template.versions[storage]] = lambda: physical
        return chain

    def _arguments(self, replayer: Replayer) -> tuple[Any, Any]:
        """The inputs again: detached, and stand-ins where the call overwrites or never read them."""
        assert self.template is not None
        arguments = self.origin.arguments
        real: list[Any] = [h.tensor() if isinstance(h, Away) else h for h in arguments.held]
        chains: dict[int, Chain] = {}
        for storage in self.template.mutated_outside:
            kind, number = self.template.outside_names.get(storage, ("", 0))
            if kind == "input":
                tensor = real[arguments.inputs[number]]
                chains[tensor.untyped_storage()._cdata] = self._chain(storage, tensor.detach())

        def one(place: int, held: Any) -> Tensor:
            if isinstance(held, Absent):
                return replayer.input_over(held.layout, Chain(), held.requires_grad)
            tensor: Tensor = real[place]
            chain = chains.get(tensor.untyped_storage()._cdata) if chains else None
            if chain is not None:
                return replayer.input_over(Layout.of(tensor), chain, held.requires_grad)
            if isinstance(tensor, nn.Parameter):
                return tensor
            return tensor.detach().requires_grad_(held.requires_grad)

        return arguments.again(one)

    def _swap_buffers(self, replayer: Replayer) -> None:
        assert self.template is not None
        for storage in self.template.mutated_outside:
            kind, path = self.template.outside_names.get(storage, ("", ""))
            if kind == "buffer":
                owner, _, name = path.rpartition(".")
                module = self.origin.block.get_submodule(owner)
                buffer = module._buffers[name]
                assert buffer is not None
                module._buffers[name] = replayer.input_over(Layout.of(buffer), self._chain(storage, buffer), False)

    def _swap_parameters(self, replayer: Replayer) -> None:
        """Stand-ins for the parameters that are not whole, or may not be by the time an operation needs them."""
        stand_ins = {}
        for one in self.origin.partitioned:
            chain = Chain()
            chain.loaders[0] = one.gathered
            stand_ins[id(one.parameter)] = replayer.input_over(one.layout, chain, one.parameter.requires_grad)
        stand_ins_for_parameters(self.origin.block, stand_ins)


class Dropped:
    """A tensor that a replay of its block brings back; ``sources`` keeps alive what the replay will read."""

    __slots__ = ("__weakref__", "layout", "number", "sessions", "sources")

    def __init__(self, tensor: Tensor, number: int, sessions: Sessions) -> None:
        self.layout, self.number, self.sessions = Layout.of(tensor), number, sessions
        self.sources: list[Any] = []

    def unpack(self) -> Tensor:
        """The tensor, from the block's replay."""
        return self.sessions.unpack(self.number, self.layout)


def _never(value: Any) -> Tensor:
    raise ReplayError("a block ran backward inside its own forward while it was being replayed")
