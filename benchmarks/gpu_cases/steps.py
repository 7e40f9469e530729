"""The fused step: AdamW over a billion parameters and over a model of 124 million, and every other rule."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu_cases import Case, Place, Timed, plain_torch
from memopt.kernels import Quantized, State, Update, dequantize_blockwise, get_codec, step
from memopt.kernels import math as km

SCALARS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "shrink": 1 - 1e-5}
PAIRS: dict[str, tuple[str | None, str | None]] = {
    "fp32": (None, None),
    "8bit": ("sq127", "root4"),
    "8bit-dynamic": ("dynamic8", "dynamic8u"),
    "4bit": ("sq15", "sqrt"),
}


Codecs = tuple[str | None, ...]


def _adamw(p, g, states, s):  # type: ignore[no-untyped-def]
    m = s.beta1 * states[0] + (1 - s.beta1) * g
    v = s.beta2 * states[1] + (1 - s.beta2) * g * g
    return p * s.shrink - s.lr * m / (km.sqrt(v) + s.eps), (m, v)


ADAMW = Update("adamw_benchmark", (State("m"), State("v", signed=False)), tuple(SCALARS), _adamw)


def shapes(place: Place, model: str) -> list[tuple[int, ...]]:
    """``large``: 2**30 parameters in 16 tensors; ``124M``: GPT-2, biases and norms included."""
    if model == "large":
        return [(place.size(1 << 14, 8), 4096)] * place.size(16, 2)
    width, layers = place.size(768, 64), place.size(12, 1)
    block = [(width,)] * 4 + [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(place.size(50257, 101), width), (place.size(1024, 16), width), (width,), (width,), *block * layers]


def cases(place: Place) -> Iterator[Case]:
    for model, dtype in (("large", torch.bfloat16), ("124M", torch.float32), ("124M", torch.bfloat16)):
        for name in PAIRS:
            yield Case(
                f"AdamW {name} states, {model}, {str(dtype)[6:]}",
                functools.partial(_check, place, dtype, ADAMW, PAIRS[name], SCALARS),
                functools.partial(_prepare, place, model, dtype, name),
                first=name == "8bit",
            )
    for update in _rules():
        codecs = tuple("sq127" if state.signed else "root4" for state in update.states)
        yield Case(
            f"{update.name} 8bit states, 268M, bfloat16",
            functools.partial(_check, place, torch.bfloat16, update, codecs, dict.fromkeys(update.scalars, 0.1)),
            functools.partial(_prepare_rule, place, update, codecs),
        )


def _rules() -> list[Update]:
    from benchmarks.gpu_targets import updates

    return [update for update in updates() if update.name != "adamw"]


def _prepare(place: Place, model: str, dtype: torch.dtype, name: str) -> Timed:
    sizes = shapes(place, model)
    params = [(torch.randn(s, device=place.device) * 0.02).to(dtype) for s in sizes]
    grads = [(torch.randn(s, device=place.device) * 1e-3).to(dtype) for s in sizes]
    timed = _timed(ADAMW, params, grads, PAIRS[name], SCALARS)
    timed.peers = {"torch fused": functools.partial(_torch_fused, params, grads)}
    if importlib.util.find_spec("bitsandbytes") and name.startswith("8bit") and place.device.type == "cuda":
        timed.peers["bitsandbytes"] = functools.partial(_bitsandbytes, params, grads)
    return timed


def _prepare_rule(place: Place, update: Update, codecs: tuple[str, ...]) -> Timed:
    sizes = [(place.size(1 << 14, 8), 4096)] * place.size(4, 1)
    params = [(torch.randn(s, device=place.device) * 0.02).bfloat16() for s in sizes]
    grads = [(torch.randn(s, device=place.device) * 1e-3).bfloat16() for s in sizes]
    return _timed(update, params, grads, codecs, dict.fromkeys(update.scalars, 0.1))


def _timed(
    update: Update, params: list[Tensor], grads: list[Tensor], codecs: Codecs, scalars: dict[str, float]
) -> Timed:
    states = states_of(params, codecs)
    number = 0

    def run() -> None:
        nonlocal number
        number += 1
        step(update, params, grads, states, codecs, scalars, seed=1, step=number)

    *changed, moves = update.writes()
    moved = sum(t.nbytes for t in grads) + (1 + moves) * sum(t.nbytes for t in params)
    moved += sum((1 + written) * s.nbytes for stored, written in zip(states, changed, strict=True) for s in stored)
    return Timed(run, floor_bytes=moved)


def zero_states(params: list[Tensor], name: str) -> list[list[Tensor | Quantized]]:
    """AdamW's states in one of ``PAIRS``."""
    return states_of(params, PAIRS[name])


def states_of(params: list[Tensor], codecs: Codecs) -> list[list[Tensor | Quantized]]:
    """Zeros for each codec and parameter; float32 tensors where there is no codec."""
    return [
        [Quantized.zeros(tuple(p.shape), codec, p.device) if codec else torch.zeros_like(p).float() for p in params]
        for codec in codecs
    ]


def _check(place: Place, dtype: torch.dtype, update: Update, codecs: Codecs, scalars: dict[str, float]) -> None:
    """A step on a few odd shapes against the oracle: parameters to 2 places, states to one cell."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(9, 700), (1000,), (256, 512), ()]
    values = [torch.randn(s, generator=generator) for s in sizes]
    gradients = [torch.randn(s, generator=generator).to(place.device) for s in sizes]

    def run() -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        params = [v.to(place.device, dtype) for v in values]
        states = states_of(params, codecs)
        sums = step(update, params, gradients, states, codecs, scalars, step=3)
        decoded = [dequantize_blockwise(s) if isinstance(s, Quantized) else s for stored in states for s in stored]
        return params, decoded, sums

    ours = run()
    with plain_torch():
        plain = run()
    for a, b in zip(ours[0], plain[0], strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    for key, expected in plain[2].items():
        torch.testing.assert_close(ours[2][key], expected, rtol=1e-5, atol=1e-6)
    for i, (a, b) in enumerate(zip(ours[1], plain[1], strict=True)):
        codec = codecs[i // len(sizes)]
        widest = get_codec(codec).values().unique().diff().max().item() if codec else 1e-6
        close = (a - b).abs() <= 2e-6 * b.abs()
        assert close.float().mean() > 0.99
        assert ((a - b).abs() <= widest * b.abs().max() * 1.01 + 1e-12).all()


def _torch_fused(params: list[Tensor], grads: list[Tensor]) -> Callable[[], object]:
    copies = [p.clone().requires_grad_() for p in params]
    for copy, g in zip(copies, grads, strict=True):
        copy.grad = g
    return torch.optim.AdamW(copies, lr=1e-3, fused=True).step


def _bitsandbytes(params: list[Tensor], grads: list[Tensor]) -> Callable[[], object]:
    import bitsandbytes

    copies = [torch.nn.Parameter(p.clone()) for p in params]
    for copy, g in zip(copies, grads, strict=True):
        copy.grad = g
    return bitsandbytes.optim.AdamW8bit(copies, lr=1e-3).step
