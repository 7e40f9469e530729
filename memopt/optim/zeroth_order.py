"""Zeroth-order training: gradients are estimated from losses alone, along directions regenerated from a seed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from memopt.optim import checks
from memopt.optim.coverage.bases import base_factory, trainable
from memopt.optim.coverage.blocks import Block, find_blocks, given_blocks
from memopt.optim.directions import Directions, SameNoise
from memopt.optim.gradient_release import Alone
from memopt.optim.sharding import is_sharded, local_of

ORDERS = ("ascending", "descending", "random")
OWN_RULES = ("sgd", "sign")
_COUNTED = ("steps", "skipped_steps", "seed")


class ZerothOrder(torch.optim.Optimizer):
    """Trains with forward passes only: no gradients, no saved activations, no optimizer state unless the rule has some.

    With ``z`` standard normal, drawn anew from the seed whenever it is needed and never stored::

        s = (loss(p + eps z) - loss(p - eps z)) / (2 eps)            sides=2
        s = (loss(p + eps z) - loss(p)) / eps                        sides=1
        p = p (1 - lr weight_decay) - lr s z                         rule="sgd" (MeZO, ZO-SGD)
        p = p (1 - lr weight_decay) - lr sign(s z)                   rule="sign" (ZO-signSGD)
        p = what the rule makes of the gradient s z                  rule=AdamW8bit (ZO-Adam) or any optimizer class

    With several ``samples`` the mean of their ``s z`` stands for ``s z``. A step is a call with a closure that returns
    the loss and does not call ``backward``::

        optimizer = ZerothOrder(model, lr=1e-6)
        for inputs, target in data:
            loss = optimizer.step(lambda: loss_of(model(inputs), target))

    Args:
        model: a module, or parameters or parameter groups as torch's optimizers take them.
        rule: ``"sgd"``, ``"sign"``, or an optimizer's class or name.
        lr: learning rate; also per group.
        eps: length of the perturbation in units of the parameters.
        samples: directions per step.
        sides: 2 for central differences, 1 for forward differences.
        weight_decay: for ``"sgd"`` and ``"sign"``: share of each parameter, times ``lr``, taken off every step.
        blocks: perturb and update one block of parameters at a time: ``"auto"`` finds them in the module, or one entry
            per block as in :class:`BlockCoordinate`; None for all parameters at once.
        switch_every: steps per block.
        order: of blocks: ``"random"``, ``"ascending"`` or ``"descending"``.
        seed: seed of directions and order. Every rank must use the same.
        process_group: with several ranks, each with its own data: the ranks over which ``s`` is averaged, ``samples``
            numbers a step and nothing else; False where ranks are independent.
        **options: options of a ``rule`` that is an optimizer.

    Memory in bytes: weights, and one direction of 2**20 elements; with an optimizer as rule its states, and the
    gradient of one parameter at a time.

    A step whose loss is not finite changes nothing and is counted in ``skipped_steps``. The dropout masks of all
    evaluations of a step are the same. Taking a perturbation back leaves a rounding error of about one place of the
    parameter's type, as in the reference's code.

    Raises:
        ValueError: an option out of range; several ranks and no ``process_group``.

    Reference: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes" (2023), algorithms 1 and 2; Zhang
    et al., "Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A Benchmark" (2024).
    """

    def __init__(
        self,
        model: Any,
        rule: Any = "sgd",
        *,
        lr: float = 1e-6,
        eps: float = 1e-3,
        samples: int = 1,
        sides: int = 2,
        weight_decay: float = 0.0,
        blocks: str | Sequence[object] | None = None,
        switch_every: int = 1,
        order: str = "random",
        seed: int = 0,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        _check(eps, samples, sides, switch_every, order)
        groups, self._named, self._module = trainable(model)
        self.rule = rule if rule in OWN_RULES else "gradient"
        self.inner: torch.optim.Optimizer | None = None
        defaults: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        if self.rule == "gradient":
            if weight_decay:
                options["weight_decay"] = weight_decay
            self.inner = base_factory(rule)(groups, lr=lr, **options)
            groups, defaults = [dict(g) for g in self.inner.param_groups], dict(self.inner.defaults)
        elif options:
            raise TypeError(f"rule {rule!r} takes no option {', '.join(options)}")
        else:
            _check_rates([{**defaults, **group} for group in groups])
        super().__init__(groups, defaults)
        if self.inner is not None:  # one set of groups and states: schedules and state dicts see the inner's
            self.param_groups, self.state = self.inner.param_groups, self.inner.state
            self._alone = Alone(self.inner)
        self.eps, self.samples, self.sides = float(eps), samples, sides
        self.switch_every, self.order, self.seed = switch_every, order, seed
        self.steps, self.skipped_steps = 0, 0
        self.blocks = self._find(blocks)
        self._order = [p for group in self.param_groups for p in group["params"]]
        self._numbers = {p: number for number, p in enumerate(self._order)}
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and process_group is None:
            raise ValueError(
                f"there are {dist.get_world_size()} ranks: process_group= says over which of them losses are averaged; "
                "False where every rank trains for itself"
            )
        self.process_group = process_group or None
        if self._module is None and any(map(is_sharded, self._order)):
            raise ValueError("parameters sharded by FSDP2 need the module itself as model, to have it gather them anew")

    @property
    def active_block(self) -> Block | None:
        """The block that the next step perturbs; None for all parameters."""
        if not self.blocks:
            return None
        around, place = divmod(self.steps // self.switch_every, len(self.blocks))
        turn = list(range(len(self.blocks)))
        if self.order == "random":
            random.Random(f"{self.seed}/{around}").shuffle(turn)
        return self.blocks[turn[-1 - place if self.order == "descending" else place]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Estimate and update.

        Args:
            closure: computes the loss and returns it as a tensor of one element or a number; no ``backward``. It is
                called ``sides * samples`` times, and once more for one-sided differences.

        Returns:
            The mean loss of this rank's evaluations, a float.

        Raises:
            TypeError: no closure. What the closure raises passes through, and the parameters are as before it.
        """
        if closure is None:
            raise TypeError("ZerothOrder.step needs a closure that computes the loss and returns it")
        block = self.active_block
        params = self._order if block is None else [p for p in self._order if any(p is q for q in block.params)]
        losses, slopes = self._measure(closure, params)
        shared = torch.tensor(slopes, dtype=torch.float64)
        if self.process_group is not None:
            shared = shared.to(local_of(params[0]).device)
            dist.all_reduce(shared, group=self.process_group)
            shared = shared.cpu() / self.process_group.size()
        scales = [s / self.samples for s in shared.tolist()]
        if all(map(math.isfinite, scales)):
            self._update(params, scales)
        else:
            self.skipped_steps += 1
        self._reshard()
        self.steps += 1
        return sum(losses) / len(losses)

    def state_bytes(self) -> int:
        """Bytes kept between steps: those of the rule's states."""
        values = (v for state in self.state.values() for v in state.values() if isinstance(v, Tensor))
        return sum(local_of(value).nbytes for value in values)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the count of steps in every group, so that a resumed run draws the same directions."""
        position = json.dumps({name: getattr(self, name) for name in _COUNTED})
        for group in self.param_groups:
            group["zeroth_order"] = position
        return super().state_dict() if self.inner is None else self.inner.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where the state dict was taken.

        Raises:
            ValueError: it is of another kind of optimizer; nothing has changed.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is a {type(state_dict).__name__}; it must be what an optimizer's returned")
        position = _position(state_dict)
        if self.inner is None:
            super().load_state_dict(cast("dict[str, Any]", state_dict))
        else:
            self.inner.load_state_dict(cast("dict[str, Any]", state_dict))
            self.param_groups, self.state = self.inner.param_groups, self.inner.state
            self._alone = Alone(self.inner)
        self.steps, self.skipped_steps, self.seed = (position[name] for name in _COUNTED)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once directions are counted: make a new optimizer over all parameters instead."""
        if hasattr(self, "blocks"):
            raise ValueError("the parameters of this ZerothOrder are fixed; make a new one over all of them")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        wrapped = ("step", "zero_grad")  # schedulers put theirs on the instance
        return {k: v for k, v in self.__dict__.items() if k not in wrapped and not k.startswith("_optimizer_")}

    def _find(self, blocks: str | Sequence[object] | None) -> list[Block]:
        if blocks is None:
            return []
        if not isinstance(blocks, str):
            return given_blocks(blocks, self._named)
        if blocks != "auto" or self._module is None:
            raise ValueError(f"blocks is {blocks!r}; list the blocks, or pass the module as model and blocks='auto'")
        return find_blocks(self._module)

    def _directions(self) -> Directions:
        """Those of the present step."""
        return Directions(f"{self.seed}/{self.steps}", self.samples, self._numbers)

    def _measure(self, closure: Callable[[], Any], params: list[Tensor]) -> tuple[list[float], list[float]]:
        """Losses, and per sample the slope along its direction; parameters are as before, but for rounding."""
        noise = SameNoise(params)
        return self._directions().measure(lambda: self._loss(closure, noise), params, self.eps, self.sides)

    def _loss(self, closure: Callable[[], Any], noise: SameNoise) -> float:
        self._reshard()
        noise.rewind()
        loss = closure()
        return float(loss.detach() if isinstance(loss, Tensor) else loss)

    def _reshard(self) -> None:
        """Have FSDP2 gather the parameters anew: those of the root stay gathered after a forward pass."""
        if self._module is not None and any(map(is_sharded, self._order)):
            for module in self._module.modules():
                if hasattr(module, "reshard"):
                    cast(Any, module).reshard()

    def _update(self, params: list[Tensor], scales: list[float]) -> None:
        wanted, along = set(params), self._directions()
        for group in self.param_groups:
            for param in group["params"]:
                if param not in wanted:
                    continue
                if self.inner is not None:
                    gradient = torch.empty_like(param)
                    target = local_of(gradient)
                    start = 0
                    for part, g in along.gradient(param, scales):
                        if part.shape == target.shape:
                            target.copy_(g)
                        else:
                            target.view(-1)[start : start + g.numel()] = g
                            start += g.numel()
                    param.grad = gradient
                    self._alone.step(param)
                    param.grad = None
                    continue
                lr, keep = float(group["lr"]), 1.0 - float(group["lr"]) * float(group["weight_decay"])
                for part, g in along.gradient(param, scales):
                    part.copy_(part.float() * keep - lr * (g.sign_() if self.rule == "sign" else g))


def _position(state_dict: Mapping[str, Any]) -> dict[str, int]:
    """The counts and the seed that a state dict carries."""
    groups = state_dict.get("param_groups") or [{}]
    try:
        position: dict[str, int] = json.loads(groups[0]["zeroth_order"])
        checks.whole(position, *_COUNTED, maximum=2**63 - 1)
    except KeyError:
        raise ValueError("the state dict has no position of ZerothOrder; was it saved by one?") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"the state dict's position of ZerothOrder cannot be read, nothing loaded: {error}") from None
    return position


def _check(eps: float, samples: int, sides: int, switch_every: int, order: str) -> None:
    if not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps!r}; it must be a finite number above 0")
    for name, value in (("samples", samples), ("switch_every", switch_every)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
    if sides not in (1, 2):
        raise ValueError(f"sides is {sides!r}; it must be 1 (forward differences) or 2 (central ones)")
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; it must be one of {', '.join(map(repr, ORDERS))}")


def _check_rates(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        for name in ("lr", "weight_decay"):
            if not 0 <= float(group[name]) < math.inf:
                raise ValueError(f"{name} is {group[name]!r}; it must be a finite number of at least 0")
