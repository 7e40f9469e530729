"""The fused AdamW step: a billion parameters in few tensors, and a model of 124 million in many."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu_cases import Case, Place
from memopt.kernels import Quantized, State, Update, dequantize_blockwise, get_codec, step
from memopt.kernels import math as km

SCALARS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "shrink": 1 - 1e-5}
PAIRS: dict[str, tuple[str | None, str | None]] = {
    "fp32": (None, None),
    "8bit": ("sq127", "root4"),
    "8bit-dynamic": ("dynamic8", "dynamic8u"),
    "4bit": ("sq15", "sqrt"),
}


def _adamw(p, g, states, s):  # type: ignore[no-untyped-def]
    m = s.beta1 * states[0] + (1 - s.beta1) * g
    v = s.beta2 * states[1] + (1 - s.beta2) * g * g
    return p * s.shrink - s.lr * m / (km.sqrt(v) + s.eps), (m, v)


ADAMW = Update("adamw_benchmark", (State("m"), State("v", signed=False)), tuple(SCALARS), _adamw)


def shapes(place: Place, model: str) -> list[tuple[int, ...]]:
    """``large``: 2**30 parameters in 16 tensors; ``124M``: GPT-2, biases and norms included."""
    if model == "large":
        return [(place.size(1 << 14, 8), 4096)] * place.size(16, 2)
    width, layers = place.size(768, 64), place.size(12, 2)
    block = [(width,)] * 4 + [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(place.size(50257, 101), width), (place.size(1024, 16), width), (width,), (width,), *block * layers]


def cases(place: Place) -> Iterator[tuple[str, Callable[[], Case]]]:
    for model, dtype in (("large", torch.bfloat16), ("124M", torch.float32), ("124M", torch.bfloat16)):
        for name in PAIRS:
            title = f"AdamW {name} states, {model}, {str(dtype)[6:]}"
            yield title, functools.partial(_case, place, model, dtype, name, title)


def _case(place: Place, model: str, dtype: torch.dtype, name: str, title: str) -> Case:
    sizes = shapes(place, model)
    params = [(torch.randn(s, device=place.device) * 0.02).to(dtype) for s in sizes]
    grads = [(torch.randn(s, device=place.device) * 1e-3).to(dtype) for s in sizes]
    states = zero_states(params, name)
    number = 0

    def run() -> None:
        nonlocal number
        number += 1
        step(ADAMW, params, grads, states, PAIRS[name], SCALARS, seed=1, step=number)

    held = sum(s.nbytes for stored in states for s in stored)
    peers = {"torch fused": functools.partial(_torch_fused, params, grads)}
    if importlib.util.find_spec("bitsandbytes") and name.startswith("8bit") and place.device.type == "cuda":
        peers["bitsandbytes"] = functools.partial(_bitsandbytes, params, grads)
    moved = 3 * sum(p.nbytes for p in params) + 2 * held
    return Case(title, run, functools.partial(_check, place, dtype, name), floor_bytes=moved, peers=peers)


def zero_states(params: list[Tensor], name: str) -> list[list[Tensor | Quantized]]:
    return [
        [Quantized.zeros(tuple(p.shape), codec, p.device) if codec else torch.zeros_like(p).float() for p in params]
        for codec in PAIRS[name]
    ]


def _check(place: Place, dtype: torch.dtype, name: str) -> None:
    """Two steps on a few odd shapes against the oracle: parameters to 2 places, moments to one cell."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(9, 700), (1000,), (257, 3), (64, 4096), ()]
    outcomes = []
    before = os.environ.get("MEMOPT_KERNELS")
    values = [torch.randn(s, generator=generator) for s in sizes]
    gradients = [torch.randn(s, generator=generator) for s in sizes]
    for forced in (None, "torch"):
        if forced:
            os.environ["MEMOPT_KERNELS"] = forced
        try:
            params = [v.to(place.device, dtype) for v in values]
            states = zero_states(params, name)
            step(ADAMW, params, [g.to(place.device) for g in gradients], states, PAIRS[name], SCALARS, step=3)
            decoded = [dequantize_blockwise(s) if isinstance(s, Quantized) else s for stored in states for s in stored]
            outcomes.append((params, decoded))
        finally:
            os.environ.pop("MEMOPT_KERNELS", None)
            if before is not None:
                os.environ["MEMOPT_KERNELS"] = before
    for a, b in zip(outcomes[0][0], outcomes[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    for i, (a, b) in enumerate(zip(outcomes[0][1], outcomes[1][1], strict=True)):
        codec = PAIRS[name][i // len(sizes)]
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
