"""The forward of a planned block: runs the block's own, with the plan's saved-tensor hooks around it."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from memopt.offload.ambient import cached_here, random_states, uncached
from memopt.offload.calls import Call, Compiled, Policy, unpack
from memopt.offload.checking import check_call
from memopt.offload.origin import Counts, Origin
from memopt.offload.partitioned import Partitioned, hooks_unrecorded, is_partitioned, partitioned_parameters
from memopt.offload.recording import Recorder, copy_of_storage
from memopt.offload.replay.replaying import replaying
from memopt.offload.template import Kind, Template
from memopt.offload.tiling import Tiled
from memopt.planner.values import BlockPlan

_MAX_VARIANTS = 64


class PlannedForward:
    """Stands in a block's ``forward`` attribute while a plan is applied; ``own`` is what it covers.

    Args:
        block: the module.
        path: its name in the model.
        plans: for each call in a step, the plan's part and its policy; calls beyond them begin again.
        model: whose step the block runs in.
        counts: of replays, for the report of a step.
        take_off: takes the whole plan off, where it does not fit the block.
    """

    of_plan = True

    def __init__(
        self,
        block: nn.Module,
        path: str,
        plans: list[tuple[BlockPlan, Policy] | None],
        model: nn.Module,
        counts: Counts,
        take_off: Callable[[], None],
    ) -> None:
        self.block, self.path, self.plans = block, path, plans
        self._model, self._counts, self._take_off = model, counts, take_off
        self.own: Callable[..., Any] = block.forward
        self.was_attribute = "forward" in block.__dict__
        self.calls = 0
        self.removed = False
        self._parameters: list[nn.Parameter] = list(block.parameters())
        self._partitioned: tuple[Partitioned, ...] = ()
        # Around the block torch.compile may do as it likes; in here everything must run as it is written.
        self._eager: Callable[..., Any] = torch.compiler.disable(self._run)  # type: ignore[no-untyped-call]
        self._variants: list[dict[Any, tuple[Compiled, Policy]]] = [{} for _ in plans]
        self._templates: list[Template | None] = [None for _ in plans]
        # Several calls of a block share their weights' casts, as without a plan; one call frees what it drops.
        tiled = any(isinstance(part.__dict__.get("forward"), Tiled) for part in block.modules())
        self._ambient: Callable[[], Any] = (cached_here if tiled else uncached) if len(plans) == 1 else nullcontext

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._eager(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if replaying():
            # Inside the replay of an outer block: what this block saves is its own affair.
            with saved_tensors_hooks(_nothing, _nothing):
                return self.own(*args, **kwargs)
        if self.removed or not torch.is_grad_enabled():
            return self.own(*args, **kwargs)
        number = self.calls % len(self.plans)
        if torch._C._current_graph_task_id() == -1:
            self.calls += 1
        planned = self.plans[number]
        if planned is None:
            return self.own(*args, **kwargs)
        variants = self._variants[number]
        # DeepSpeed may partition the parameters after the plan has been applied.
        sharded = bool(self._parameters) and is_partitioned(self._parameters[0])
        key = (self.block.training, sharded, *_shapes(args), *(_shapes(kwargs.values()) if kwargs else ()))
        known = variants.get(key)
        if known is None:
            return self._first(number, key, planned, args, kwargs)
        compiled, policy = known
        if compiled.idle:
            output = self.own(*args, **kwargs)
            policy.tier.block_ended()
            return output
        origin = self._origin(number, compiled, args, kwargs) if compiled.needs.last_pack >= 0 else None
        call = Call(self._where(number), origin, policy, compiled)
        with call, self._ambient(), saved_tensors_hooks(call.pack, unpack):
            output = self.own(*args, **kwargs)
        if len(call.handles) != len(compiled.storages):
            # It did something else than when it was recorded (a branch, a frozen parameter): look again next time.
            variants.pop(key, None)
        call.leave(compiled)
        return output

    def _origin(self, number: int, compiled: Compiled, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Origin:
        """What a replay of a call that begins now would start from."""
        origin = self._started(number, args, kwargs)
        needs, template = compiled.needs, compiled.template
        origin.arguments.forget(*template.arguments)
        if needs.random:
            origin.generators = template.generators
            origin.states = random_states(origin.generators)
        for storage in needs.copies:
            place = template.outside_names.get(storage)
            if place is not None:
                inputs = origin.arguments.tensors() if place[0] == "input" else []
                tensor = inputs[place[1]] if inputs else self.block.get_buffer(place[1])
                origin.copies[storage] = copy_of_storage(tensor)
        return origin

    def _started(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Origin:
        where = self._where(number)
        return Origin(self.block, self._parameters, where, self.own, args, kwargs, self._counts, self._partitioned)

    def _first(
        self, number: int, key: Any, planned: tuple[BlockPlan, Policy], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The first call of a kind: recorded while it runs, and checked against the plan."""
        plan, policy = planned
        try:
            self._partitioned = partitioned_parameters(self.block, self.path, self._model)
        except ValueError:
            self._take_off()
            raise
        self._parameters = list(self.block.parameters())
        first = self._templates[number]
        # A later kind of call keeps everything once; until it has been seen, the plan's indices mean nothing for it.
        used = policy if first is None else Policy({}, {}, policy.tier)
        origin = self._started(number, args, kwargs)
        call = Call(origin.where, origin, used, None)
        recorder = call.recorder = Recorder(self._known(origin), used.recomputes, self._partitioned)
        saving = saved_tensors_hooks(call.pack, unpack)
        with call, self._ambient(), saving, recorder, hooks_unrecorded(self.block, recorder):
            output = self.own(*args, **kwargs)
        recorder.template.arguments = len(origin.arguments.held), origin.arguments.read(recorder.touched)
        template = recorder.finish()
        try:
            with call:
                check_call(plan, template, first is None)
        except ValueError:
            self._take_off()
            raise
        compiled = used.compile(template)
        origin.arguments.forget(*template.arguments)
        origin.generators = template.generators
        origin.states = [recorder.generator_states[id(g)] for g in template.generators]
        origin.copies = {s: c for s, c in recorder.copies.items() if s in compiled.needs.copies}
        call.leave(compiled)
        variants = self._variants[number]
        if len(variants) >= _MAX_VARIANTS:
            variants.clear()
        if first is None:
            self._templates[number] = template
            variants[key] = (compiled, policy)
        else:
            moved = policy.moved(first, template)
            variants[key] = (moved.compile(template), moved)
        return output

    def _known(self, origin: Origin) -> list[tuple[Tensor, Kind, Any]]:
        known: list[tuple[Tensor, Kind, Any]] = [(p, Kind.PARAMETER, None) for p in self.block.parameters()]
        known += [(b, Kind.BUFFER, ("buffer", name)) for name, b in self.block.named_buffers()]
        known += [(p, Kind.PARAMETER, None) for p in self._model.parameters()]
        known += [(b, Kind.BUFFER, None) for b in self._model.buffers()]
        known += [(t, Kind.INPUT, ("input", n)) for n, t in enumerate(origin.arguments.tensors())]
        return known

    def _where(self, number: int) -> str:
        return f"{self.path!r}" if len(self.plans) == 1 else f"{self.path!r} (call {number})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model is not planned: its blocks run their own forward, on their own parameters."""
        block = memo.get(id(self.block))
        if block is None or self.was_attribute:
            return copy.deepcopy(self.own, memo)
        return types.MethodType(type(self.block).forward, block)

    def __reduce__(self) -> Any:
        raise TypeError(
            f"block {self.path!r} runs under a memopt plan and cannot be pickled; save model.state_dict(), or take the "
            "plan off first with handle.remove()"
        )

    def restore(self) -> None:
        """Put the block's own forward back; whoever has covered this one in the meantime comes to it through here."""
        self.removed = True
        if self.block.__dict__.get("forward") is self:
            if self.was_attribute:
                self.block.forward = self.own
            else:
                del self.block.forward


def _shapes(values: Any) -> tuple[Any, ...]:
    return tuple((v.shape, v.dtype, v.requires_grad) if isinstance(v, Tensor) else type(v) for v in values)


def _nothing(value: Any) -> Any:
    return None
