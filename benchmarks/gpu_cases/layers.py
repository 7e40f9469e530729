"""The layers, forward and backward, against torch's own."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from benchmarks.gpu_cases import Case, Place, Timed, plain_torch
from benchmarks.layer_cases import layers

# Tensors of the input's size that are read or written at least, forward and backward.
MOVED = {"RMSNorm": 5, "LayerNorm": 5, "SwiGLU": 8, "GEGLU": 8, "ReLU": 4, "dropout": 4, "rotary": 6}


def cases(place: Place) -> Iterator[Case]:
    for name in MOVED:
        arguments = (place, name)
        yield Case(f"{name} bf16", functools.partial(_check, *arguments), functools.partial(_prepare, *arguments))


def _check(place: Place, name: str) -> None:
    outcomes = []
    for plain in (False, True):
        torch.manual_seed(0)
        made = layers(70, 200, torch.bfloat16, place.device)
        torch.manual_seed(1)  # of the dropout
        run = made[name]["memopt"]
        if plain:
            with plain_torch():
                outcomes.append(run())
        else:
            outcomes.append(run())
    for ours, expected in zip(*outcomes, strict=True):  # type: ignore[call-overload]
        size = expected.float().abs().max().item()
        torch.testing.assert_close(ours, expected, rtol=0.016, atol=4e-3 * size)


def _prepare(place: Place, name: str) -> Timed:
    rows, width = place.size(16384, 16), place.size(4096, 64)
    both = layers(rows, width, torch.bfloat16, place.device)[name]
    return Timed(both["memopt"], floor_bytes=MOVED[name] * rows * width * 2, peers={"torch": lambda: both["torch"]})
