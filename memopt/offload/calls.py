"""One execution of a planned block: what is saved, and what becomes of each saved storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from memopt.offload.actions import BlockCall, Saver, saver
from memopt.offload.checking import whole_actions
from memopt.offload.handles import Kept, Leaving, Piece, Stored
from memopt.offload.origin import Origin
from memopt.offload.partitioned import ByParameter, SavedParameter
from memopt.offload.recording import Recorder
from memopt.offload.replay.cones import Needs, needs_of
from memopt.offload.replay.session import Dropped, Sessions
from memopt.offload.template import Kind, Template
from memopt.offload.tiers import Tier
from memopt.planner.tracking import restoring
from memopt.planner.values import Action, BlockPlan, StorageAction


class Policy:
    """The actions of one block call, ready to be looked up by saved storage.

    Args:
        actions: from the plan, by saved-storage index; what is not named is kept.
        inputs: the same for the inputs that autograd saves in the call.
        tier: where swapped storages go.
    """

    def __init__(self, actions: Mapping[int, StorageAction], inputs: Mapping[int, StorageAction], tier: Tier) -> None:
        self.actions, self.inputs = dict(actions), dict(inputs)
        self.tier = tier
        self._savers = {index: saver(action) for index, action in self.actions.items()}
        self._inputs = {index: saver(action) for index, action in self.inputs.items()}
        self._keep = saver(StorageAction(-1, 0, Action.KEEP))

    @classmethod
    def of(cls, plan: BlockPlan, tier: Tier) -> Policy:
        """The actions of a plan's part, parts of storages put together."""
        return cls(whole_actions(plan, "actions"), whole_actions(plan, "inputs"), tier)

    @property
    def recomputes(self) -> bool:
        """Whether anything is dropped."""
        return any(found.drops for found in self._savers.values())

    def saver(self, index: int) -> Saver:
        """What saves the storage of this index."""
        return self._savers.get(index, self._keep)

    def input_saver(self, index: int) -> Saver:
        """What saves the input of this index."""
        return self._inputs.get(index, self._keep)

    def moved(self, first: Template, other: Template) -> Policy:
        """The same actions for calls of other shapes, in another mode, or with other parameters frozen.

        The two sequences of operations are aligned; a storage gets the action of the storage that the same operation
        made in the first kind of call, and is kept where there is none.
        """
        births, others = first.births(), other.births()
        left, right = [op.func._schema.name for op in first.ops], [op.func._schema.name for op in other.ops]
        same: dict[int, int] = {}
        for match in SequenceMatcher(None, right, left, autojunk=False).get_matching_blocks():
            same.update((match.a + n, match.b + n) for n in range(match.size))
        made_by = {births[first.saved[n]]: action for n, action in self.actions.items() if first.saved[n] in births}
        actions = {}
        for n, storage in enumerate(other.saved):
            number, place = others.get(storage, (-1, 0))
            action = made_by.get((same.get(number, -1), place))
            if action is not None:
                actions[n] = replace(action, index=n)
        return Policy(actions, self.inputs, self.tier)

    def compile(self, template: Template) -> Compiled:
        """Everything that later calls need, by saved tensor."""
        dropped = {
            index
            for index, found in self._savers.items()
            if found.drops and index < len(template.saved) and template.kinds[template.saved[index]] is Kind.MADE
        }
        feeding = {index for index in range(len(template.saved)) if self.saver(index).exact} - dropped
        needs = needs_of(template, dropped, feeding)
        savers = []
        for number, pack in enumerate(template.packs):
            made = pack.saved >= 0 and template.kinds[template.saved[pack.saved]] is Kind.MADE
            if pack.input >= 0:
                given = self.input_saver(pack.input)
                savers.append(given if given.passive else Given(given))
            elif number in template.owners:
                savers.append(ByParameter(template.owners[number], self._keep))
            else:
                savers.append(self.saver(pack.saved) if made else self._keep)
        return Compiled(template, needs, tuple(savers), tuple(pack.saved for pack in template.packs))


class Given(Saver):
    """Saves the tensors over one of the block's inputs as an action says."""

    def __init__(self, action: Saver) -> None:
        self._action = action

    def save(self, call: BlockCall, number: int, tensor: Tensor) -> Any:
        """The action's way with inputs."""
        return self._action.save_input(call, tensor)


class Compiled:
    """A template together with what a policy makes of it."""

    __slots__ = ("idle", "needs", "savers", "storages", "template")

    def __init__(self, template: Template, needs: Needs, savers: tuple[Saver, ...], storages: tuple[int, ...]) -> None:
        self.template, self.needs, self.savers, self.storages = template, needs, savers, storages
        self.idle = all(found.passive for found in savers)


class Call:
    """One execution of a block under a policy; lives in forward only.

    Args:
        where: the block, for messages.
        origin: what a replay would start from, where there can be one.
        policy, compiled: what to do; not yet compiled while the call is being recorded.

    What it made for autograd lives on; of those objects only ``Dropped`` ones hold on to the call's origin.
    """

    def __init__(self, where: str, origin: Origin | None, policy: Policy, compiled: Compiled | None) -> None:
        self.where, self.policy, self.compiled, self.tier = where, policy, compiled, policy.tier
        self.sessions = None if origin is None else Sessions(origin)
        self.stored: dict[int, Stored] = {}
        self.handles: list[Any] = []
        self.leaving: list[tuple[Any, Leaving]] = []
        self.recorder: Recorder | None = None
        self._savers: tuple[Saver, ...] = () if compiled is None else compiled.savers

    def __enter__(self) -> None:
        """A stretch of forward; if it fails, the call lets go of everything."""

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is not None:
            self.close()

    def pack(self, tensor: Tensor) -> Any:
        """Saved-tensor hook: what autograd gets to hold."""
        number = len(self.handles)
        if self.recorder is not None:
            handle = self._first_pack(number, tensor)
        elif number < len(self._savers):
            handle = self._savers[number].save(self, number, tensor)
        else:
            handle = Kept(tensor, self.where)
        self.handles.append(handle)
        return handle

    def storage_of(self, number: int) -> int:
        """Which of the saved storages a saved tensor lies over, as far as is known by now."""
        if self.recorder is not None:
            return self.recorder.template.packs[number].saved
        assert self.compiled is not None
        return self.compiled.storages[number]

    def drop(self, number: int, tensor: Tensor) -> Dropped:
        """The promise that a replay of the call brings a saved tensor back."""
        assert self.sessions is not None
        return Dropped(tensor, number, self.sessions)

    def signs_only(self, number: int) -> bool:
        """Whether backward needs only the signs of a saved tensor; unknown, so no, until the call has been recorded."""
        return self.compiled is not None and number in self.compiled.template.signs_only

    def _first_pack(self, number: int, tensor: Tensor) -> Any:
        assert self.recorder is not None
        index = self.recorder.packed(tensor)
        template = self.recorder.template
        # What is done to save it is not the block's doing.
        self.recorder.paused = True
        try:
            if template.packs[-1].input >= 0:
                return self.policy.input_saver(template.packs[-1].input).save_input(self, tensor)
            if number in template.owners:
                return SavedParameter(tensor, template.owners[number], self.where)
            if index < 0 or template.kinds[template.saved[index]] is not Kind.MADE:
                return Kept(tensor, self.where)
            return self.policy.saver(index).save(self, number, tensor)
        finally:
            self.recorder.paused = False

    def leave(self, compiled: Compiled) -> None:
        """Forward is over: tie what will be recomputed to what it will be recomputed from."""
        sessions, needs, handles = self.sessions, compiled.needs, self.handles
        replayed = sessions is not None and needs.last_pack >= 0
        if self.leaving:
            self._move_inputs(sessions.origin if sessions is not None and replayed else None)
        if sessions is not None and replayed:
            sessions.template, sessions.needs = compiled.template, needs
            first = {compiled.storages[n]: handles[n] for n in needs.source_packs if n < len(handles)}
            for number, handle in enumerate(handles):
                if isinstance(handle, Dropped):
                    sessions.dropped.append(ref(handle))
                    index = compiled.storages[number] if number < len(compiled.storages) else -1
                    handle.sources = [first[s] for s in needs.sources.get(index, ()) if s in first]
            for n in needs.source_packs:
                handle = handles[n] if n < len(handles) else None
                if isinstance(handle, Piece):
                    handle.stored.is_source = True
                if isinstance(handle, (Kept, Piece)):
                    sessions.sources[n] = ref(handle)
            sessions.origin.left()
        self.tier.block_ended()
        self.close()

    def _move_inputs(self, origin: Origin | None) -> None:
        """The block does not need its inputs any more: they go, once each, however many tensors lie over them."""
        gone: list[Stored] = []
        for given, handle in self.leaving:
            stored = next((one for one in gone if one.is_of(handle.tensor)), None)
            if stored is None:
                stored = given.moved(self, handle.tensor)
                gone.append(stored)
                if origin is not None:
                    origin.arguments.leave(stored)
            handle.leave(stored)

    def close(self) -> None:
        """Let go of everything. Autograd holds the pack hook, and so this call, as long as what it saved."""
        self.handles, self.stored, self.leaving, self.sessions, self.recorder = [], {}, [], None, None


def unpack(handle: Any) -> Tensor:
    """Saved-tensor hook: the tensor for backward.

    Raises:
        RuntimeError: the backward is itself recorded (``create_graph=True``).
    """
    if torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1:
        where = getattr(handle, "where", None) or _where(handle)
        raise RuntimeError(
            f"block {where} runs under a memopt plan, which cannot be differentiated twice (create_graph=True): take "
            "the plan off with handle.remove() before the forward of such a step"
        )
    with restoring():
        found: Tensor = handle.unpack()
    return found


def _where(handle: Any) -> str:
    if isinstance(handle, Dropped):
        return handle.sessions.origin.where
    return str(handle.stored.where)
