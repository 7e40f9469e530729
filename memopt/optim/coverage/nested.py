"""An optimizer that leaves the arithmetic to another one, which sees only the part of the parameters that holds state.

The outer optimizer is an ordinary ``torch.optim.Optimizer`` over all parameters: schedulers, hooks, ``zero_grad`` and
per-group options work on it. The inner optimizer, of any class, is made anew whenever the covered part changes, with
one group per outer group; options are copied to it before every step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from memopt.optim import checks
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


@dataclass(frozen=True)
class _ByName:
    """Makes the optimizer of a name, looked up when called."""

    name: str

    def __call__(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        from memopt.optim.registry import make

        return make(self.name, params, **options)


def base_factory(base: Any) -> Callable[..., torch.optim.Optimizer]:
    """What makes an optimizer from parameters and options: the class itself, or a name looked up when called."""
    if isinstance(base, str):
        return _ByName(base)
    wrong = isinstance(base, type) and not issubclass(base, torch.optim.Optimizer)
    if wrong or isinstance(base, torch.optim.Optimizer) or not callable(base):
        found = f"an {type(base).__name__}, made already" if isinstance(base, torch.optim.Optimizer) else repr(base)
        raise TypeError(f"base is {found}; it must be an optimizer class such as memopt.optim.AdamW8bit, or its name")
    return cast("Callable[..., torch.optim.Optimizer]", base)


def trainable(model: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor], nn.Module | None]:
    """Parameter groups, names and, where one was given, the module."""
    if isinstance(model, nn.Module):
        named: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("the model has no parameter that requires gradients; nothing can be trained")
        return [{"params": list(named.values())}], named, model
    items = [] if isinstance(model, Tensor | str) or not isinstance(model, Iterable) else list(model)
    if not all(isinstance(item, Tensor | tuple | Mapping) for item in items) or (not items and model != []):
        raise TypeError(
            f"model is a {type(model).__name__}; it must be a module, a list of parameters, or parameter groups"
        )
    groups = [dict(item) for item in items] if items and isinstance(items[0], Mapping) else [{"params": items}]
    named = {}
    for group in groups:
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        params = [p if isinstance(p, tuple) else (str(len(named) + i), p) for i, p in enumerate(params)]
        kept = [(name, p) for name, p in params if p.requires_grad]
        named.update(kept)
        group["params"] = [p for _, p in kept]
    if not named:
        raise ValueError("model holds no parameter that requires gradients; nothing can be trained")
    return [group for group in groups if group["params"]], named, None


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
        groups, states = self._read(incoming)
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

    def _parse(self, text: Any) -> dict[str, Any]:
        name = type(self).__name__
        try:
            position = json.loads(text)
        except (TypeError, ValueError):
            position = None
        if not isinstance(position, dict):
            raise ValueError(f"expected a position of {name} and found {text!r}; was this saved by {name}?")
        if position.get("of") != name:
            raise ValueError(f"this is a position of {position.get('of')!r}, this optimizer is {name}: {text}")
        missing = [key for key in ("started", *self._get_position()) if key not in position]
        if missing:
            raise ValueError(f"the position lacks {', '.join(missing)}, nothing loaded: {text}")
        try:
            checks.flag(position, "started")
            checks.whole(position, "visit", "since", maximum=2**63 - 1)
            self._check_position(position)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the position does not fit this {name}, nothing loaded: {error}") from error
        return position

    def _read(self, incoming: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
        """The groups of a state dict, and its states by position: it may name parameters instead of counting them."""
        if "state" not in incoming or "param_groups" not in incoming:
            raise ValueError(f"the state dict needs 'state' and 'param_groups'; it has {sorted(incoming)}")
        groups, states = cast("list[dict[str, Any]]", incoming["param_groups"]), incoming["state"]
        if not isinstance(groups, list | tuple) or not all(isinstance(g, Mapping) and "params" in g for g in groups):
            raise ValueError("param_groups of the state dict is no list of groups with 'params'; nothing loaded")
        if not isinstance(states, Mapping):
            raise ValueError("state of the state dict is no mapping of parameters to their states; nothing loaded")
        sizes = [len(group["params"]) for group in self.param_groups]
        saved = [len(group["params"]) for group in groups]
        if sizes != saved:
            raise ValueError(
                f"the state dict has groups of {saved} parameters, this optimizer of {sizes}; nothing loaded"
            )
        keys = [key for group in groups for key in group["params"]]
        return groups, {i: states[key] for i, key in enumerate(keys) if key in states}

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
