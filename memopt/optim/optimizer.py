"""The optimizer object: groups, state and checkpoints. The arithmetic is the rule's and the kernels'."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from memopt.kernels import State
from memopt.optim import checkpoint, checks, kahan, scaling, sharding
from memopt.optim.batch import Batch
from memopt.optim.coverage import All, Coverage
from memopt.optim.formats import StateFormat, format_for, get_format
from memopt.optim.gathering import Gathering
from memopt.optim.gradients import any_nonfinite
from memopt.optim.layout import is_flat
from memopt.optim.reaching import reach_of
from memopt.optim.scaling import Uncertain
from memopt.optim.slot import Slot

ParamsT: TypeAlias = "Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]"

PARAM_ROUNDINGS = ("nearest", "stochastic", "kahan")


class RuleOptimizer(torch.optim.Optimizer):
    """What every rule's optimizer shares. A rule sets ``rule`` and gives ``check``, ``states`` and ``update``.

    Args:
        params: parameters, or groups of them; every option can be set per group.
        own: the rule's own options with their values.
        state: how states are kept: a name (``"fp32"``, ``"bf16"``, ``"8bit"``, ...) or a ``StateFormat``. Parameters of
            fewer than 4096 elements (of the global shape) keep fp32 states in every low-bit format.
        maximize: climb instead of descend.
        param_rounding: how new values are rounded where parameters are bf16 or fp16: ``"nearest"``, ``"stochastic"``
            (unbiased: small updates are not lost on average), or ``"kahan"`` (what is lost is kept in a state of the
            parameter's type and given back, 2 bytes a parameter).
        seed: seed of the stochastic rounding, which depends on nothing but this seed, the step, the parameter's
            position and the element's index.
        skip_nonfinite: when any gradient holds a NaN or an infinity, change nothing and count the step in
            ``group["skipped_steps"]``. It reads every gradient once more, and waits for the device.
    """

    rule: ClassVar[str]
    elementwise: ClassVar[bool] = True  # whether the update of an element looks at that element alone
    optional: ClassVar[tuple[State, ...]] = ()  # states that some options ask for; kept while these are switched off
    coverage: Coverage = All()
    numbering: Mapping[Tensor, int] | None = None  # positions of parameters, where not that in the groups
    _step_supports_amp_scaling = True  # torch.amp.GradScaler then sets the two tensors below for the time of a step
    grad_scale: Tensor | None  # what gradients were multiplied by
    found_inf: Tensor  # above 0 where one of them is not finite
    _guard: Tensor | None = None  # both as the kernels read them, during a step that leaves them on the device

    def __init__(
        self,
        params: ParamsT,
        own: dict[str, Any],
        *,
        state: str | StateFormat = "8bit",
        maximize: bool = False,
        param_rounding: str = "nearest",
        seed: int = 0,
        skip_nonfinite: bool = False,
    ) -> None:
        defaults = {
            **own,
            "state": state,
            "maximize": maximize,
            "param_rounding": param_rounding,
            "seed": seed,
            "skip_nonfinite": skip_nonfinite,
        }
        self._check_options(defaults)
        defaults["state"] = get_format(state).name
        self._gathering = Gathering()
        self._uncertain = Uncertain()
        super().__init__(checks.ordered(params) if not isinstance(params, Tensor) else params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._gathering = Gathering()
        self._uncertain = Uncertain()
        self.defaults.pop("differentiable", None)  # torch adds it, for optimizers that can be differentiated through

    def __getstate__(self) -> dict[str, Any]:
        self._uncertain.settle()
        own: dict[str, Any] = {name: self.__dict__[name] for name in ("numbering", "coverage") if name in self.__dict__}
        return {**super().__getstate__(), **own}

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` or ``TypeError`` where one of the rule's own options in ``group`` is wrong."""
        raise NotImplementedError

    def states(self, group: Mapping[str, Any], param: Tensor) -> tuple[State, ...]:
        """The states that ``param`` has under these options."""
        raise NotImplementedError

    def update(self, batch: Batch) -> None:
        """Take one step for a batch of parameters."""
        raise NotImplementedError

    def _check_options(self, group: Mapping[str, Any]) -> None:
        self.check(group)
        get_format(group["state"])
        checks.flag(group, "maximize", "skip_nonfinite")
        checks.one_of(group, "param_rounding", PARAM_ROUNDINGS)
        checks.whole(group, "seed")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own options; the constructor's fill the gaps. A wrong option adds nothing."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"param_group is {param_group!r}; it must be a dict with 'params'")
        unknown = set(param_group) - set(self.defaults) - {"params", "param_names", "initial_lr", *checkpoint.HEADER}
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has no option {', '.join(sorted(map(repr, unknown)))} for a parameter group; "
                f"the options are {', '.join(self.defaults)}"
            )
        params = checks.ordered(param_group["params"])
        tensors = [param[1] if isinstance(param, tuple) else param for param in params]
        merged = {**self.defaults, **param_group, "params": tensors}
        self._check_options(merged)
        for number, tensor in enumerate(tensors):
            if isinstance(tensor, Tensor):
                checks.dtype(tensor, f"params[{number}]", type(self).__name__)
        if len(set(map(id, tensors))) < len(tensors):
            raise ValueError("params holds a parameter twice; list each once")
        header = checkpoint.header(self.rule)
        state = get_format(merged["state"]).name
        super().add_param_group({**param_group, "params": params, "state": state, **header})

    @_disable_dynamo  # a compiled training step runs it between its graphs
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step on every parameter that has a gradient.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward`` and returns the loss; optional.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._uncertain.settle()
        self._guard = scaling.guard_of(self)
        if self._guard is None and self._found_inf():
            return loss
        batches = self._gathering.batches(self)
        if not self._skips(batches):
            for batch in batches:
                for slot in batch.slots:
                    slot.stored["step"] = batch.step
                batch.guard = self._guard
                self.update(batch)
                for slot in batch.slots:
                    if slot.reach is not None:
                        slot.reach.put_back(slot.param)
            if self._guard is not None:
                self._uncertain.note(self.found_inf, (slot.stored for batch in batches for slot in batch.slots))
        for batch in batches:
            batch.forget()
        self._guard = None
        return loss

    def state_bytes(self) -> int:
        """Bytes kept between steps in this process: codes, scales and plain states."""
        tensors = (v for stored in self.state.values() for v in stored.values() if isinstance(v, Tensor))
        return sum(sharding.local_of(tensor).nbytes for tensor in tensors)

    def state_dict(self) -> dict[str, Any]:
        """As torch's: plain tensors and numbers. Groups also carry the rule, the format, the seed and a version."""
        self._uncertain.settle()
        return checkpoint.export(self, super().state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state dict of this rule and format, or of torch's own optimizer for this rule.

        fp32 states of a torch optimizer are put into this optimizer's format.

        Raises:
            ValueError: another rule, format, version or shape; the message says what differs and nothing is loaded.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is a {type(state_dict).__name__}; it must be what an optimizer's returned")
        incoming: dict[str, Any] = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            incoming = before(self, incoming) or incoming
        groups, state = checkpoint.read(self, incoming)
        self.__setstate__({"state": state, "param_groups": groups})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def grad_factor(self, group: Mapping[str, Any]) -> float:
        """What rules multiply gradients by: -1 to maximise, over the scale of a ``GradScaler``."""
        sign = -1.0 if group["maximize"] else 1.0
        scale = getattr(self, "grad_scale", None)
        return sign if scale is None or self._guard is not None else sign / float(scale)

    def _found_inf(self) -> bool:
        return float(getattr(self, "found_inf", 0.0)) > 0

    def _skips(self, batches: list[Batch]) -> bool:
        grads = [grad for batch in batches if batch.group["skip_nonfinite"] for grad in batch.grads]
        if not any_nonfinite(grads, (param for group in self.param_groups for param in group["params"])):
            return False
        for group in self.param_groups:
            group["skipped_steps"] += 1
        return True

    def slot(self, number: int, group: Mapping[str, Any], param: Tensor, stored: dict[str, Any]) -> Slot:
        """How a parameter's states are kept, without allocating them; ``stored`` holds, or will hold, them."""
        extent = sharding.extent_of(param)
        chosen = format_for(group["state"], extent)
        flat = chosen.block and sharding.is_sharded(param) and is_flat(extent, chosen.block)
        reach = None
        if flat and not sharding.cuts_between(param, chosen.block):  # the parts do not end where its blocks do
            reach = reach_of(param, chosen.block, elementwise=self.elementwise)
            extent = reach.extent
            param = sharding.stand_in(param, extent.local)
        specs = self.states(group, param)
        if kahan.applies(group["param_rounding"], param.dtype):
            specs = (*specs, kahan.COMPENSATION)
        idle = tuple(spec for spec in self.optional if spec not in specs)
        return Slot(param, number, extent, specs, chosen, stored, reach, idle)

    def initial_values(self, group: Mapping[str, Any]) -> Mapping[str, float]:
        """What states start from where that is not 0."""
        return {}

    def complete(self, slot: Slot, group: Mapping[str, Any]) -> bool:
        """Allocate the states that a parameter lacks: all of a new one, or what an option asks for since.

        Returns:
            Whether it lacked one.

        Raises:
            ValueError: its type is none that the kernels take, or its states are kept in another format.
        """
        checks.dtype(slot.param, f"parameter {slot.number}", type(self).__name__)
        values, stored, started = self.initial_values(group), slot.stored, False
        lost = stored.get(kahan.COMPENSATION.name)
        if lost is not None and (kahan.COMPENSATION not in slot.specs or lost.dtype != slot.param.dtype):
            del stored[kahan.COMPENSATION.name]  # of the type that the parameter had
        for spec in slot.specs:
            if all(key in stored for key in slot.kept(spec)[0].keys(spec)):
                continue
            others = [key for key in (spec.name, f"{spec.name}_codes") if key in stored]
            if others:
                raise ValueError(
                    f"parameter {slot.number} of shape {tuple(slot.param.shape)} has {', '.join(others)}, which is not "
                    f"how {group['state']!r} keeps {spec.name} for it: neither a group's state nor a parameter's shape "
                    "may change; make a new optimizer, which takes the old one's states through memopt.optim.convert"
                )
            slot.write(spec, values.get(spec.name, 0.0))
            started = True
        stored.setdefault("step", 0)
        return started
