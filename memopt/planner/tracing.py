"""``trace``: one training step of a model on fake tensors, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memopt.planner.assembling import assemble
from memopt.planner.eager import eager_paths
from memopt.planner.faking import Faker, faked
from memopt.planner.guessing import Guesses
from memopt.planner.recorder import Recorder
from memopt.planner.records import tensors_in
from memopt.planner.values import Trace

LossFn = Callable[..., Any]


class TraceError(ValueError):
    """A model that could not be traced; the message names the module it failed in and the shapes it was given."""


def trace(
    model: nn.Module,
    inputs: Any,
    loss_fn: LossFn | None = None,
    optimizer: Optimizer | None = None,
    *,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
) -> Trace:
    """Traces one training step (forward, loss, backward, optimizer step) as it runs once training has settled.

    Nothing is computed and nothing is allocated: tensors are fake, parameters may be real, on the meta device or on a
    GPU. The model runs in the mode (train or eval) that it is in, and is left exactly as it was.

    Args:
        model: any module.
        inputs: what the loop passes: a tuple of positional arguments, a dict of keyword arguments or one tensor.
        loss_fn: from the model's output to the loss, or to several losses (tuple, list, dict) that are added. Default:
            the output itself where it is a scalar, its ``loss`` where it has one, else the mean of its first
            floating-point tensor.
        optimizer: whose step is traced, with gradients freed after it as ``zero_grad`` does; None: no step.
        autocast: run forward and loss under ``torch.autocast`` of this type.
        accumulate: forward and backward passes before the optimizer's step.

    Returns:
        The operations, storages and blocks of the step; ``peak_bytes`` is what ``memopt.meter`` would show.

    Raises:
        TraceError: the model, the loss or the optimizer failed on fake tensors, or no loss could be found.
        TypeError: ``model`` or ``inputs`` is of another type.
    """
    _check(model, inputs, accumulate)
    faker = Faker()
    recorder = Recorder(model, _device_of(model), faker.stand_in)
    try:
        with torch.enable_grad(), eager_paths(), faked(model, faker):
            _run(model, faker, recorder, inputs, loss_fn, optimizer, autocast, accumulate)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(_explain(recorder, error)) from error
    return assemble(model, recorder)


def _check(model: Any, inputs: Any, accumulate: int) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(inputs, (tuple, list, Mapping, Tensor)):
        raise TypeError(f"inputs must be a tuple, a dict or a tensor, not {type(inputs).__name__}")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, not {accumulate}")


def _device_of(model: nn.Module) -> str:
    tensors = (*model.parameters(), *model.buffers())
    return "cuda" if any(tensor.device.type == "cuda" for tensor in tensors) else "cpu"


def _run(
    model: nn.Module,
    faker: Faker,
    recorder: Recorder,
    inputs: Any,
    loss_fn: LossFn | None,
    optimizer: Optimizer | None,
    autocast: torch.dtype | None,
    accumulate: int,
) -> None:
    """Sets everything up as it is before a step, then runs that step under the recorder."""
    device = _device_of(model)
    if autocast is None and torch.is_autocast_enabled(device):
        autocast = torch.get_autocast_dtype(device)
    given = _arguments(inputs)
    positional, named = faker.value(given)
    guesses = Guesses(faker.mode)
    guesses.remember((positional, named), given)
    with torch.autocast(device, enabled=False), faker.mode, guesses:
        twin = None if optimizer is None else _settled(faker, optimizer)
        recorder.adopt_module(model)
        if twin is not None:
            recorder.adopt_optimizer(twin)
        recorder.adopt((positional, named))
        recorder.start()
        try:
            for _ in range(accumulate):
                context = nullcontext() if autocast is None else torch.autocast(device, autocast)
                with torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda tensor: tensor), context:
                    output = model(*positional, **named)
                    loss = _loss(output, loss_fn)
                torch.clear_autocast_cache()  # as leaving the outermost context does
                if not loss.requires_grad:
                    raise TraceError("the loss needs no gradient: no parameter that requires one takes part in it")
                loss.backward()  # type: ignore[no-untyped-call]
            if twin is not None:
                twin.step()
                _forget_unused(twin, recorder)
        finally:
            recorder.stop()


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as positional and keyword arguments."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), {str(key): value for key, value in inputs.items()}
    return tuple(inputs), {}


def _settled(faker: Faker, optimizer: Optimizer) -> Optimizer:
    """The optimizer's twin with the state that it has after a first step."""
    twin = faker.optimizer(optimizer)
    if callable(getattr(twin, "update", None)):  # memopt's own: kernels do the arithmetic, the class only keeps state
        twin.__dict__["update"] = lambda batch: None
    trained = [p for group in twin.param_groups for p in group["params"] if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    twin.step()
    for parameter in trained:
        parameter.grad = None
    return twin


def _forget_unused(optimizer: Optimizer, recorder: Recorder) -> None:
    """Takes back the state of parameters that got no gradient: a real optimizer never makes it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                for tensor in tensors_in(optimizer.state.get(parameter)):
                    record = recorder.observe(tensor)
                    if record is not None:
                        record.death = record.birth


def _loss(output: Any, loss_fn: LossFn | None) -> Tensor:
    found = _default_loss(output) if loss_fn is None else loss_fn(output)
    parts = list(tensors_in(found))
    if not parts:
        raise TraceError(f"no loss: loss_fn returned {type(found).__name__}; it must return a scalar tensor")
    total = parts[0] if parts[0].dim() == 0 else parts[0].sum()
    for part in parts[1:]:
        total = total + (part if part.dim() == 0 else part.sum())
    return total


def _default_loss(output: Any) -> Tensor:
    if isinstance(output, Tensor) and output.dim() == 0:
        return output
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    for tensor in tensors_in(dict(output) if isinstance(output, Mapping) else output):
        if tensor.is_floating_point():
            return tensor.mean()
    raise TraceError(f"no loss: the model returned {type(output).__name__} without a floating tensor; give loss_fn")


def _explain(recorder: Recorder, error: Exception) -> str:
    text = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {text[0] if text else ''}"
    if recorder.failed is None:
        phase = recorder.history.phases[-1].value if recorder.history.phases else "setting up"
        return f"the trace failed in {phase}: {reason}"
    path, shapes = recorder.failed
    return f"the trace failed in module {path or 'the model itself'!r} called with ({shapes}): {reason}"
