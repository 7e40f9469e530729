"""The fused optimizer step over many parameters: load, decode, update, encode, store, in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.kernels import step_torch
from memopt.kernels.backend import choose_backend
from memopt.kernels.codecs import Codec, get_codec
from memopt.kernels.request import StepRequest, Stored, check, unguarded
from memopt.kernels.strided import Runner, run_contiguous
from memopt.kernels.update import Update

if TYPE_CHECKING:
    from memopt.kernels.native.step import Launch


def step(
    update: Update,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Stored]],
    codecs: Sequence[Codec | str | None],
    scalars: Mapping[str, float],
    *,
    seed: int = 0,
    step: int = 0,
    numbers: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    roundings: Sequence[str | None] | None = None,
    param_rounding: str = "nearest",
    guard: Tensor | None = None,
) -> dict[str, Tensor]:
    """Applies ``update`` to every parameter in place.

    Args:
        update: the rule.
        params: float32, bfloat16 or float16 tensors on one device, any strides.
        grads: one gradient per parameter, of its shape; float32, bfloat16 or float16.
        states: for each state of the rule, one entry per parameter: a float tensor of its shape, or a
            :class:`~memopt.kernels.Quantized`.
        codecs: for each state its codec (or its name), None where the tensors are plain.
        scalars: the rule's numbers by name, the same for all parameters of the call.
        seed: what the random numbers depend on, with the step, the parameter's number and the element's global index.
        step: the number of this step.
        numbers: the number of each parameter in the model, so that calls may be grouped freely; default 0, 1, ...
        offsets: the global index of the first element of each parameter, where it holds some of the rows of a
            sharded one; default 0.
        roundings: for each state ``"nearest"`` or ``"stochastic"``; default: the codec's own, nearest for plain ones.
        param_rounding: how parameters below 32 bits are rounded.
        guard: two float32 numbers: what gradients are multiplied by, and whether (above 0) the step is called off, as a
            ``GradScaler`` decides. Triton reads them on the device, so that the host need not wait.

    Returns:
        The rule's reductions by name, float32 (number of parameters,); empty for most rules.

    All arithmetic is float32. Nothing is changed when an argument is refused. Results do not depend on the number of
    threads, nor on how rows are sharded.
    """
    options: dict[str, Any] = {
        "numbers": numbers,
        "offsets": offsets,
        "roundings": roundings,
        "param_rounding": param_rounding,
        "guard": guard,
    }
    request = step_request(update, params, grads, states, codecs, scalars, seed=seed, step=step, **options)
    if not params:
        return {name: torch.zeros(0) for name in update.reductions}
    backend = choose_backend(params[0].device)
    ready = request if backend == "triton" else unguarded(request)
    if ready is None:
        return {name: torch.zeros(len(params), device=params[0].device) for name in update.reductions}
    return run_contiguous(ready, _runner(backend))


def step_request(
    update: Update,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Stored]],
    codecs: Sequence[Codec | str | None],
    scalars: Mapping[str, float],
    *,
    seed: int = 0,
    step: int = 0,
    numbers: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    roundings: Sequence[str | None] | None = None,
    param_rounding: str = "nearest",
    guard: Tensor | None = None,
) -> StepRequest:
    """The checked arguments of :func:`step`, whose docstring says what each of them is.

    Args:
        update: the rule.
        params: the parameters.
        grads: their gradients.
        states: for each state, one entry per parameter.
        codecs: for each state its codec, or None.
        scalars: the rule's numbers by name.
        seed: of the random numbers.
        step: the number of this step.
        numbers: of the parameters in the model.
        offsets: global index of each parameter's first element.
        roundings: for each state.
        param_rounding: of parameters below 32 bits.
        guard: as for :func:`step`.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message says which.
    """
    chosen = tuple(None if c is None else get_codec(c) for c in codecs)
    given = tuple(roundings) if roundings is not None else (None,) * len(chosen)
    request = StepRequest(
        update=update,
        params=params,
        grads=grads,
        states=states,
        codecs=chosen,
        roundings=tuple(r or (c.rounding if c else "nearest") for r, c in zip(given, chosen, strict=False)),
        scalars=scalars,
        seed=seed,
        step=step,
        numbers=numbers if numbers is not None else range(len(params)),
        offsets=offsets if offsets is not None else (0,) * len(params),
        param_rounding=param_rounding,
        guard=guard,
    )
    check(request)
    return request


def prepare(request: StepRequest, owners: Sequence[Tensor], memory: Sequence[Tensor]) -> Launch | None:
    """A step checked once, to be repeated with other gradients, scalars, seeds and step numbers.

    Args:
        request: from :func:`step_request`.
        owners: the tensors whose memory the request's parameters are; those may be views of them.
        memory: the tensors that its states are made of: for each state, for each parameter, its codes and scales, or
            the plain one.

    Returns:
        What carries the step out (:meth:`memopt.kernels.native.step.Launch.run`); None where every step must be
        checked anew: on a GPU, in plain torch, for tensors that are not contiguous.
    """
    if not request.params or choose_backend(request.params[0].device) != "native":
        return None
    from memopt.kernels.native.step import prepare as native

    return native(request, owners, memory)


def _runner(backend: str) -> Runner:
    if backend == "native":
        from memopt.kernels.native.step import run

        return run
    if backend == "triton":
        from memopt.kernels.gpu.step import run as run_triton

        return run_triton
    return step_torch.run
