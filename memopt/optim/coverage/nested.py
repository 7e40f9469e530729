"""An optimizer that leaves the arithmetic to another one, which sees only the part of the parameters that holds state.

The outer optimizer is an ordinary ``torch.optim.Optimizer`` over all parameters: schedulers, hooks, ``zero_grad`` and
per-group options work on it. The inner optimizer, of any class, is made anew whenever the covered part changes, with
one group per outer group; options are copied to it before every step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memopt.optim.coverage.bases import base_factory, trainable
from memopt.optim.coverage.resuming import parse, read
from memopt.optim.gradients import any_nonfinite
from memopt.optim.sharding import local_of

_NOT_OPTIONS = ("params", "param_names", "coverage")


@dataclass(eq=False)
class Seat:
    """A parameter that holds state now, and what the inner optimizer sees in its place.

    Args:
        index: the parameter's position over all groups.
        group: its group's position.
        param: the parameter.
        stand_in: the inner optimizer's parameter; ``param`` itself where nothing stands between.
        extra: what the coverage keeps for it besides the inner optimizer's state; part of the state dict.
    """

    index: int
    group: int
    param: Tensor
    stand_in: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


class Nested(torch.optim.Optimizer):
    """What the coverages that wrap another optimizer share. A coverage gives ``_get_position``,
    ``_check_position``, ``_set_position`` and ``_seats``.

    Args:
        model: a module, or parameters or parameter groups as torch's optimizers take them. Parameters that do not
            require gradients are left alone.
        base: the class (or name) of the optimizer that does the arithmetic.
        options: its options.
    """

    inner: torch.optim.Optimizer | None

    def __init__(self, model: Any, base: Any, options: dict[str, Any]) -> None:
        self._base = base_factory(base)
        self._base_options = dict(options)
        groups, self._named, self._module = trainable(model)
        probe = self._base([dict(group) for group in groups], **options)
        if not isinstance(probe, torch.optim.Optimizer):
            raise TypeError(f"base made a {type(probe).__name__}; it must make a torch.optim.Optimizer")
        if isinstance(probe, torch.optim.LBFGS):
            raise ValueError("base is LBFGS, which evaluates the loss itself; choose a rule that takes gradients")
        self._base_class = type(probe)
        super().__init__([dict(group) for group in probe.param_groups], dict(probe.defaults))
        self._occupied: list[Seat] = []
        self.inner = None

    def _get_position(self) -> dict[str, Any]:
        """The position in the coverage's cycle, as plain values."""
        raise NotImplementedError

    def _check_position(self, position: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` or ``TypeError`` where a position with every key has values that do not fit."""
        raise NotImplementedError

    def _set_position(self, position: Mapping[str, Any]) -> None:
        """Take on a position that was checked; nothing else changes."""
        raise NotImplementedError

    def _seats(self, extras: Mapping[int, Mapping[str, Any]]) -> list[Seat]:
        """The parameters that hold state at the present position, in the order of ``index``, with fresh stand-ins.

        ``extras`` holds, by index, what a state dict says about each; empty at the start of a visit.
        """
        raise NotImplementedError

    @property
    def position(self) -> str:
        """Where in its cycle the coverage is, as text; part of every parameter group of the state dict."""
        return json.dumps({"of": type(self).__name__, "started": self._started, **self._get_position()})

    def seek(self, position: str) -> None:
        """Go to a position of an earlier run, with empty states, so that a checkpoint taken there fits.

        ``load_state_dict`` does this itself. It is for ``torch.distributed.checkpoint``, which reads only the states
        that the optimizer has now: save ``optimizer.position`` beside the state dict, read it first, ``seek``, then
        load the rest.

        Raises:
            ValueError: not a position of a coverage like this one.
        """
        wanted = self._parse(position)
        self._set_position(wanted)
        self._occupy(self._seats({}))
        if wanted["started"]:
            self._initialise()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the parameters are divided: make a new optimizer over all of them instead."""
        if hasattr(self, "inner"):
            raise ValueError(f"the parameters of this {type(self).__name__} are fixed; make a new one over all of them")
        super().add_param_group(param_group)

    def state_bytes(self) -> int:
        """Bytes of everything kept between steps: the inner optimizer's states and what the coverage adds."""
        states: list[Mapping[str, Any]] = [seat.extra for seat in self._occupied]
        if self.inner is not None:
            states += list(self.inner.state.values())
        kept = {id(v): v for state in states for v in state.values() if isinstance(v, Tensor)}
        return sum(local_of(value).nbytes for value in kept.values())

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with states only for the parameters that hold any now, and the position in every group."""
        packed = {} if self.inner is None else self.inner.state_dict()["state"]
        self._mirror([packed.get(number, {}) for number in range(len(self._occupied))])
        for group in self.param_groups:
            group["coverage"] = self.position
        result = super().state_dict()
        self._mirror_live()
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue bitwise where the state dict was taken, in the middle of a visit too.

        Raises:
            ValueError: it is of another coverage, other blocks or another inner optimizer; nothing has changed.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is a {type(state_dict).__name__}; it must be what an optimizer's returned")
        incoming: dict[str, Any] = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            incoming = before(self, incoming) or incoming
        groups, states = read(incoming, [len(group["params"]) for group in self.param_groups])
        wanted = self._parse(groups[0].get("coverage"))
        old = dict(self.__dict__)  # positions and seats replace attributes and change none in place
        try:
            self._set_position(wanted)
            seats = self._seats(states)
            inner = self._make(seats)
            if inner is not None:
                self._fill(inner, seats, groups, states, wanted["started"])
        except Exception:
            self.__dict__.update(old)
            raise
        for own, saved in zip(self.param_groups, groups, strict=True):
            own.update(_options(saved))
        self._occupy(seats, inner)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        wrapped = ("step", "zero_grad")  # schedulers put theirs on the instance
        return {k: v for k, v in self.__dict__.items() if k not in wrapped and not k.startswith("_optimizer_")}

    @property
    def _started(self) -> bool:
        """Whether the inner optimizer has states."""
        return self.inner is not None and any(self.inner.state.values())

    def _parse(self, position: Any) -> dict[str, Any]:
        return parse(position, type(self).__name__, self._get_position(), self._check_position)

    def _occupy(self, seats: list[Seat], inner: torch.optim.Optimizer | None = None) -> None:
        """Make these the parameters that hold state."""
        self._occupied = seats
        self.inner = inner or self._make(seats)
        self._mirror_live()

    def _make(self, seats: list[Seat]) -> torch.optim.Optimizer | None:
        """An inner optimizer over the seats' stand-ins, with the groups' options."""
        made = []
        for number in dict.fromkeys(seat.group for seat in seats):
            known = {k: v for k, v in self.param_groups[number].items() if k in self.defaults}
            made.append({**known, "params": [seat.stand_in for seat in seats if seat.group == number]})
        if not made:
            return None
        inner = self._base(made, **self._base_options)
        if hasattr(inner, "numbering"):  # the stochastic rounding then follows the position over all parameters
            inner.numbering = {seat.stand_in: seat.index for seat in seats}
        return inner

    def _fill(
        self,
        inner: torch.optim.Optimizer,
        seats: list[Seat],
        groups: list[dict[str, Any]],
        states: Mapping[int, Mapping[str, Any]],
        started: bool,
    ) -> None:
        """Load the inner optimizer's share of a state dict."""
        own = inner.state_dict()
        numbers = dict.fromkeys(seat.group for seat in seats)
        own["param_groups"] = [
            {**_options(groups[number]), "params": group["params"]}
            for number, group in zip(numbers, own["param_groups"], strict=True)
        ]
        own["state"] = {}
        for place, seat in enumerate(seats):
            kept = {k: v for k, v in states.get(seat.index, {}).items() if k != "visit" and k not in seat.extra}
            if kept:
                own["state"][place] = kept
        if started and not own["state"]:
            raise ValueError(
                "the state dict was taken in the middle of a visit but lacks the states of it; with "
                "torch.distributed.checkpoint, call optimizer.seek(position) before the state dict is read"
            )
        inner.load_state_dict(own)

    def _mirror(self, states: list[Mapping[str, Any]]) -> None:
        visit = torch.tensor(float(self._get_position()["visit"]))
        shown = {seat.param: {**state, **seat.extra} for seat, state in zip(self._occupied, states, strict=True)}
        self.state.clear()
        for group in self.param_groups:
            for param in group["params"]:
                if param in shown or param.requires_grad:
                    self.state[param] = {**shown.get(param, {}), "visit": visit}

    def _mirror_live(self) -> None:
        """Show the inner optimizer's states under the parameters they belong to.

        Every parameter that requires a gradient gets an entry with ``visit`` at least: torch.distributed.checkpoint
        takes a step of its own on an optimizer that seems to have no state yet, which would move the cycle on.
        """
        live = {} if self.inner is None else self.inner.state
        self._mirror([live.get(seat.stand_in, {}) for seat in self._occupied])

    def _inner_groups(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(outer, inner) pairs of groups."""
        if self.inner is not None:
            numbers = dict.fromkeys(seat.group for seat in self._occupied)
            for number, inner in zip(numbers, self.inner.param_groups, strict=True):
                yield self.param_groups[number], inner

    def _skips(self) -> bool:
        """Whether ``skip_nonfinite`` calls this step off: it is counted, and neither parameters nor the cycle move."""
        watched = [group for group in self.param_groups if group.get("skip_nonfinite")]
        grads = [param.grad for group in watched for param in group["params"] if param.grad is not None]
        if not any_nonfinite(grads, self._named.values()):
            return False
        for group in self.param_groups:
            group["skipped_steps"] += 1
        return True

    def _inner_step(self) -> None:
        """One step of the inner optimizer under the present options of the outer groups."""
        if self.inner is None:
            return
        for outer, inner in self._inner_groups():
            inner.update(_options(outer))
        self.inner.step()
        for outer, inner in self._inner_groups():
            outer.update(_options(inner))

    def _initialise(self) -> None:
        """Allocate the inner optimizer's states by a step of size zero on zero gradients."""
        if self.inner is None:
            return
        grads = [seat.stand_in.grad for seat in self._occupied]
        for seat in self._occupied:
            seat.stand_in.grad = torch.zeros_like(seat.stand_in)
        for group in self.inner.param_groups:
            rate = group.get("lr", 0.0)
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
        self.inner.step()
        for outer, inner in self._inner_groups():
            inner.update(_options(outer))
        for seat, grad in zip(self._occupied, grads, strict=True):
            seat.stand_in.grad = grad
        self._mirror_live()


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in _NOT_OPTIONS}
