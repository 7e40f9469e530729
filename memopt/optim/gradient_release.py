"""Updates inside backward: each parameter is updated as soon as its gradient is ready, and the gradient is dropped."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from memopt.optim.coverage.nested import Nested
from memopt.optim.sharding import is_sharded


class Alone:
    """Takes an optimizer's step for one parameter at a time, with the values that a step for all would give it.

    Parameters are those of the time it is made.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.homes: dict[Tensor, tuple[int, int]] = {}  # positions of the group and of the parameter
        for number, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                self.homes[param] = (number, len(self.homes))

    @torch.no_grad()
    def step(self, param: Tensor) -> None:
        """The optimizer's own step with this parameter as its only one; hooks around the step are not called.

        Raises:
            RuntimeError: the optimizer counts steps in its groups, which would now count parameters.
        """
        optimizer = cast(Any, self.optimizer)
        place, number = self.homes[param]
        group = optimizer.param_groups[place]
        alone = {**group, "params": [param]}
        groups, optimizer.param_groups = optimizer.param_groups, [alone]
        numbering = getattr(optimizer, "numbering", None)
        if hasattr(optimizer, "numbering"):
            optimizer.numbering = {param: number if numbering is None else numbering[param]}
        try:
            step = type(optimizer).step
            if getattr(step, "hooked", False):
                step = step.__wrapped__
            step(optimizer)
        finally:
            optimizer.param_groups = groups
            if hasattr(optimizer, "numbering"):
                optimizer.numbering = numbering
        changed = [key for key, value in alone.items() if key != "params" and group.get(key) is not value]
        if changed:
            raise RuntimeError(
                f"{type(optimizer).__name__} counts in its groups ({', '.join(changed)}); with one step per parameter "
                "that is wrong, so its gradients cannot be used one by one"
            )


class GradientRelease:
    """What ``release_gradients`` returns: lets gradients add up for a while, and takes the hooks away again.

    Used as a context manager it removes itself at the end.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip_value: float | None, data_parallel: Any) -> None:
        self._alone = Alone(optimizer)
        self._clip_value = clip_value
        self._adding = 0
        self._removed = threading.Event()  # shared with a hook that outlives this
        self._wrapped = isinstance(data_parallel, torch.nn.parallel.DistributedDataParallel)
        self._module = data_parallel if self._wrapped else None
        self._group = None if self._wrapped or data_parallel is False else data_parallel
        self._clearing = False
        self._hooks: list[Any] = []
        cast(Any, optimizer)._released = self
        # tensors hold their hooks where Python's collector does not look: through these nothing may be kept alive
        alive = weakref.ref(self)
        if self._wrapped:
            removed, group = self._removed, data_parallel.process_group
            data_parallel.register_comm_hook(None, lambda _, bucket: _reduce(bucket, group, removed, alive))
        else:
            for param in self._alone.homes:
                hook = cast(Any, param).register_post_accumulate_grad_hook(lambda p: _living(alive)._on_gradient(p))
                self._hooks.append(hook)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes inside add their gradients up, as without release; the next one outside uses the sum.

        All gradients are alive until then, as in any exact accumulation.
        """
        self._adding += 1
        try:
            if self._module is not None:
                with self._module.no_sync():
                    yield
            else:
                yield
        finally:
            self._adding -= 1

    def remove(self) -> None:
        """Take the hooks away; ``backward`` and ``optimizer.step`` are the ordinary ones again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._removed.set()
        optimizer = cast(Any, self._alone.optimizer)
        if getattr(optimizer, "_released", None) is self:
            del optimizer._released

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _on_gradient(self, param: Tensor) -> None:
        if self._adding or param.grad is None:
            return
        if self._group is not None and not is_sharded(param):
            _average(param.grad, self._group)
        self._update(param)

    def _on_bucket(self, bucket: Any) -> None:
        """Update the parameters of a bucket of averaged gradients."""
        with torch.no_grad():
            for param, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
                if param in self._alone.homes:
                    param.grad = gradient
                    self._update(param)
        if not self._clearing:
            self._clearing = True
            engine = torch.autograd.Variable._execution_engine
            # the wrapper hands out gradients in a callback of its own, queued after this hook returns
            engine.queue_callback(lambda: engine.queue_callback(self._clear))

    def _clear(self) -> None:
        self._clearing = False
        for param in self._alone.homes:
            param.grad = None

    def _update(self, param: Tensor) -> None:
        if self._clip_value is not None:
            param.grad = cast(Tensor, param.grad).clamp_(-self._clip_value, self._clip_value)
        self._alone.step(param)
        param.grad = None


def _average(gradient: Tensor, group: dist.ProcessGroup) -> None:
    dist.all_reduce(gradient, group=group)
    gradient.div_(group.size())


def _reduce(
    bucket: Any, group: dist.ProcessGroup, removed: threading.Event, alive: weakref.ref[GradientRelease]
) -> torch.futures.Future[Tensor]:
    """What DistributedDataParallel wants of its hook: a future of the averaged bucket."""
    buffer = bucket.buffer()
    _average(buffer, group)
    if not removed.is_set():  # a wrapper's hook cannot be taken away: from then on it only averages
        _living(alive)._on_bucket(bucket)
    done: torch.futures.Future[Tensor] = torch.futures.Future(
        devices=[] if buffer.device.type == "cpu" else [buffer.device]
    )
    done.set_result(buffer)
    return done


def _living(handle: weakref.ref[GradientRelease]) -> GradientRelease:
    found = handle()
    if found is None:
        raise RuntimeError(
            "gradients of this parameter were released to an optimizer that no longer exists: keep a reference to the "
            "optimizer while you train, and call remove() on the handle of release_gradients when you are done with it"
        )
    return found


def release_gradients(
    optimizer: torch.optim.Optimizer,
    *,
    clip_value: float | None = None,
    data_parallel: Any = None,
    max_norm: None = None,
    scaler: Literal[None] = None,
) -> GradientRelease:
    """Update every parameter in backward, when its gradient is ready, and drop the gradient at once.

    Gradients are then never all alive: at most one parameter's at a time (a bucket's under DistributedDataParallel),
    instead of 2 or 4 bytes for every parameter. Values are bitwise those of the ordinary step for every rule that looks
    at one parameter at a time. The training loop may stay as it is: ``optimizer.step()`` finds no gradients and only
    runs its hooks, learning-rate schedules work as before::

        handle = memopt.optim.release_gradients(optimizer)
        for inputs, target in data:
            with handle.accumulate():                 # optional: micro-batches whose gradients are added up
                loss_of(model(inputs[0]), target[0]).backward()
            loss_of(model(inputs[1]), target[1]).backward()     # updates
            optimizer.step(); schedule.step(); optimizer.zero_grad()

    Args:
        optimizer: of memopt, torch or others; its parameters and groups are those of now.
        clip_value: clip every gradient element to [-clip_value, clip_value] before the update, as
            ``torch.nn.utils.clip_grad_value_`` does.
        data_parallel: how gradients are averaged when there are several ranks: a process group (gradients are averaged
            one by one in backward, no wrapper and no buffers needed; all ranks must use the same parameters), a model
            wrapped in DistributedDataParallel (updated bucket by bucket; its buffers remain), or False for not at all.
            FSDP2 needs nothing: its gradients arrive reduced.
        max_norm: refused: the norm over all gradients is known only when all of them are alive.
        scaler: refused: a GradScaler decides whether to step only after it has seen all gradients.

    Returns:
        A handle with ``accumulate()`` and ``remove()``.

    Raises:
        ValueError: something that needs all gradients at once, or several ranks and no word on averaging.
        TypeError: not an optimizer.

    Reentrant activation checkpointing may finish one gradient in several parts; use ``use_reentrant=False``.
    Reference: the idea is that of LOMO (Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited
    Resources", 2023, section 3), for any optimizer.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer")
    name = type(optimizer).__name__
    if max_norm is not None:
        raise ValueError(
            f"max_norm is {max_norm!r}: clipping by the global norm needs all gradients at once, which is what "
            "release_gradients avoids; clip by value (clip_value=), or keep the ordinary step"
        )
    if scaler is not None:
        raise ValueError(
            "scaler is given: a GradScaler inspects all gradients before the step, but they are used and dropped in "
            "backward; train in bfloat16, which needs no scaler, or keep the ordinary step"
        )
    if clip_value is not None and not (isinstance(clip_value, (int, float)) and 0 < clip_value < math.inf):
        raise ValueError(f"clip_value is {clip_value!r}; it must be a finite number above 0, or None")
    if isinstance(optimizer, Nested):
        raise ValueError(
            f"{name} already keeps few gradients and counts its steps; release_gradients takes an ordinary optimizer"
        )
    if getattr(optimizer, "_released", None) is not None:
        raise ValueError(
            f"the gradients of this {name} are released already; call remove() on the handle returned before"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS needs all gradients at once; they cannot be released one by one")
    if any(group.get("skip_nonfinite") for group in optimizer.param_groups):
        raise ValueError("skip_nonfinite=True looks at all gradients before the step; switch it off to release them")
    params = [param for group in optimizer.param_groups for param in group["params"]]
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several and data_parallel is None and not all(map(is_sharded, params)):
        raise ValueError(
            f"there are {dist.get_world_size()} ranks: say how gradients are averaged before the update. "
            "data_parallel= takes a process group, the DistributedDataParallel model, or False for not at all"
        )
    return GradientRelease(optimizer, clip_value, data_parallel)
