"""``trace``: one training step of a model on fake tensors, as plain values."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from memopt.planner.naming import users_line
from memopt.planner.tracing.assembling import assemble, block_calls
from memopt.planner.tracing.cuda_rules import CudaRules, workspace_bytes
from memopt.planner.tracing.eager import eager_paths, quiet_fakes
from memopt.planner.tracing.faking import Faker, faked
from memopt.planner.tracing.guessing import Guesses
from memopt.planner.tracing.losses import LossFn, TraceError, find_loss
from memopt.planner.tracing.named_optimizers import NamedOptimizer
from memopt.planner.tracing.optimizers import forget_unused, settled_twin, state_bits, steps_in_backward
from memopt.planner.tracing.recorder import Recorder
from memopt.planner.tracing.tiling import find_tiles, in_tiles
from memopt.planner.values import Category, Tile, Trace
from memopt.planner.variants import release_gradients

_ONE_AT_A_TIME = threading.RLock()  # what a trace switches off in libraries is the whole process's


def trace(
    model: nn.Module,
    inputs: Any,
    loss_fn: LossFn | None = None,
    optimizer: Optimizer | str | None = None,
    *,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    device: str | None = None,
    tiles: int = 1,
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
        optimizer: whose step is traced, with gradients freed after it as ``zero_grad`` does: an object, or a name such
            as "adamw8bit" for the bytes that it would keep. None: no step. Where ``memopt.optim.release_gradients`` has
            been given the optimizer, every gradient goes as soon as backward has made it.
        autocast: run forward and loss under ``torch.autocast`` of this type.
        accumulate: forward and backward passes before the optimizer's step.
        device: type of the device that the step is to run on, "cpu" or "cuda"; default: where the parameters are (those
            on the meta device count as on the CPU). For "cuda" the trace saves what CUDA's kernels save and rounds
            sizes as its allocator does, whether or not there is a GPU.
        tiles: above 1, the step in which token-wise parts of blocks (MLPs, as a rule) run in that many tiles, one after
            another, so that what they save can be kept, swapped and recomputed tile by tile and little of the rest is
            alive at a time. A plan for it makes them do so. Their outputs are those of the whole call up to rounding;
            dropout in them draws other numbers; gradients of their weights are added up over the tiles.

    Returns:
        The operations, storages and blocks of the step; ``peak_bytes`` is what ``memopt.meter`` would show. ``tiles``
        names the modules that run in tiles: none where tiles were not asked for, or nothing would gain. Where the
        model asks for a value that no trace can know, and goes on by it, ``meta["guessed_at"]`` names the lines; the
        trace took 1.0, 0 or False there.

    Raises:
        TraceError: the model, the loss or the optimizer failed on fake tensors, or no loss could be found.
        ValueError: an unknown optimizer or device, or a number of tiles below 1.
        TypeError: ``model`` or ``inputs`` is of another type.
    """
    _check(model, inputs, accumulate, device, tiles)
    if isinstance(optimizer, str):
        optimizer = NamedOptimizer([p for p in model.parameters() if p.requires_grad], optimizer)
    step = Step(inputs, loss_fn, optimizer, autocast, accumulate)
    recorder, made = _traced(model, step, device)
    if tiles > 1 and (found := find_tiles(recorder, block_calls(recorder), tiles)):
        with in_tiles(model, found):
            _, made = _traced(model, step, device, found)
    return made


def _traced(model: nn.Module, step: Step, device: str | None, tiles: tuple[Tile, ...] = ()) -> tuple[Recorder, Trace]:
    faker = Faker()
    target = device or _device_of(model)
    recorder = Recorder(model, target, faker.stand_in)
    rules = CudaRules() if target == "cuda" and _device_of(model) == "cpu" else nullcontext()
    try:
        with _ONE_AT_A_TIME, torch.enable_grad(), eager_paths(), quiet_fakes(), faked(model, faker):
            bits, guessed_at = _run(model, faker, recorder, step, rules)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(_explain(recorder, error)) from error
    made = assemble(model, recorder, tiles)
    if guessed_at:
        made = replace(made, meta={**made.meta, "guessed_at": ", ".join(guessed_at)})
    if bits is not None:
        made = replace(made, meta={**made.meta, "state_bits": bits})
        if step.accumulate == 1 and steps_in_backward(model):
            made = release_gradients().apply(replace(made, meta={**made.meta, "gradients": "released"}))
    return recorder, made


@dataclass(frozen=True)
class Step:
    """What ``trace`` was asked to run."""

    inputs: Any
    loss_fn: LossFn | None
    optimizer: Optimizer | None
    autocast: torch.dtype | None
    accumulate: int


def _check(model: Any, inputs: Any, accumulate: int, device: str | None, tiles: int) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model is a torch.jit.ScriptModule, which cannot run on fake tensors: trace what it was made of"
        )
    if not isinstance(inputs, (tuple, list, Mapping, Tensor)):
        raise TypeError(f"inputs must be a tuple, a dict or a tensor, not {type(inputs).__name__}")
    lazy = [name for name, tensor in model.named_parameters() if is_lazy(tensor)]
    if lazy:
        raise TraceError(f"parameter {lazy[0]!r} has no shape yet (a lazy module): run the model's forward once first")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, not {accumulate}")
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', not {device!r}")
    if not isinstance(tiles, int) or tiles < 1:
        raise ValueError(f"tiles must be a whole number of at least 1, not {tiles!r}")


def _device_of(model: nn.Module) -> str:
    tensors = (*model.parameters(), *model.buffers())
    return "cuda" if any(tensor.device.type == "cuda" for tensor in tensors) else "cpu"


def _run(
    model: nn.Module, faker: Faker, recorder: Recorder, step: Step, rules: AbstractContextManager[Any]
) -> tuple[float | None, list[str]]:
    """Sets everything up as it is before a step, then runs that step under the recorder.

    Returns:
        Bits of each number of the optimizer's state, None without an optimizer; the lines where a value was guessed.
    """
    device, autocast = _device_of(model), step.autocast
    if autocast is None and torch.is_autocast_enabled(device):
        autocast = torch.get_autocast_dtype(device)
    given = _arguments(step.inputs)
    positional, named = faker.value(given)
    guesses = Guesses(faker.mode, faker.tensor)
    guesses.remember((positional, named), given)
    with torch.autocast(device, enabled=False), faker.mode, guesses:
        twin = None if step.optimizer is None else settled_twin(faker, step.optimizer, recorder.device == "cuda")
        recorder.adopt_module(model)
        if twin is not None:
            recorder.adopt_optimizer(twin)
        recorder.adopt((positional, named))
        if recorder.device == "cuda":
            recorder.adopt(torch.empty(workspace_bytes(), dtype=torch.uint8), Category.TEMPORARIES)
        recorder.start()
        try:
            for _ in range(step.accumulate):
                context = nullcontext() if autocast is None else torch.autocast(device, autocast)
                with torch.autograd.graph.saved_tensors_hooks(recorder.pack, recorder.unpack), rules, context:
                    output = model(*positional, **named)
                    loss = find_loss(output, step.loss_fn)
                torch.clear_autocast_cache()  # as leaving the outermost context does
                if not loss.requires_grad:
                    raise TraceError("the loss needs no gradient: no parameter that requires one takes part in it")
                loss.backward()  # type: ignore[no-untyped-call]
            if twin is not None:
                twin.step()
                forget_unused(twin, recorder)
        finally:
            recorder.stop()
    return None if twin is None else state_bits(twin), list(guesses.guessed_at)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as positional and keyword arguments."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), {str(key): value for key, value in inputs.items()}
    return tuple(inputs), {}


def _explain(recorder: Recorder, error: Exception) -> str:
    text = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {text[0] if text else ''}"
    where = users_line(error.__traceback__)
    reason += f" (at {where})" if where else ""
    if recorder.failed is None:
        phase = recorder.history.phases[-1].value if recorder.history.phases else "setting up"
        return f"the trace failed in {phase}: {reason}"
    path, shapes = recorder.failed
    return f"the trace failed in module {path or 'the model itself'!r} called with ({shapes}): {reason}"
