"""What ``memopt bench`` measures: this machine's steps, quantisers and losses against torch and installed peers.

All variants of a row run in turn in one process, round by round, so that a machine whose speed drifts slows all of
them alike; the figures are ratios of medians.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ROUNDS = 7
PARAMETERS = 8_000_000
TENSORS = 8
ELEMENTS = 16_000_000
TOKENS, WIDTH, VOCABULARY = 1024, 512, 32_000


@dataclass(frozen=True)
class Row:
    """One measurement: what ran, its median seconds, and those over the baseline's of the same table."""

    name: str
    seconds: float
    ratio: float
    note: str = ""


def interleaved(cases: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of every case; a first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(rounds + 1):
        for name, run in cases.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def against_first(cases: dict[str, Callable[[], object]], notes: dict[str, str] | None = None) -> list[Row]:
    """The cases as rows; the first is the baseline of the ratios."""
    seconds = interleaved(cases)
    base = next(iter(seconds.values()))
    return [Row(name, value, value / base, (notes or {}).get(name, "")) for name, value in seconds.items()]


def optimizers(device: str) -> list[Row]:
    """AdamW over 8 million float32 parameters: torch's fused one first, then memopt's formats and installed peers."""
    from memopt.optim import AdamW

    def parameters() -> list[Tensor]:
        tensors = [torch.randn(PARAMETERS // TENSORS // 500, 500, device=device) for _ in range(TENSORS)]
        for tensor in tensors:
            tensor.requires_grad_().grad = torch.randn_like(tensor) * 1e-3
        return tensors

    made: dict[str, torch.optim.Optimizer] = {"torch AdamW fused": torch.optim.AdamW(parameters(), fused=True)}
    for state in ("fp32", "bf16", "8bit", "4bit"):
        made[f"memopt AdamW {state}"] = AdamW(parameters(), state=state)
    if importlib.util.find_spec("bitsandbytes"):
        made["bitsandbytes AdamW8bit"] = importlib.import_module("bitsandbytes.optim").AdamW8bit(parameters())
    notes = {}
    for name, optimizer in made.items():
        optimizer.step()  # makes the states
        if hasattr(optimizer, "state_bytes"):
            notes[name] = f"{optimizer.state_bytes() / PARAMETERS:.3f} B of state per parameter"
    return against_first({name: optimizer.step for name, optimizer in made.items()}, notes)


def quantisers(device: str) -> list[Row]:
    """16 million float32 elements through memopt's 8- and 4-bit codecs, into memory that is there; first a copy."""
    from memopt.kernels import dequantize_blockwise, quantize_blockwise

    x, to = torch.randn(ELEMENTS // 1000, 1000, device=device), torch.empty(ELEMENTS // 1000, 1000, device=device)
    cases: dict[str, Callable[[], object]] = {"copy_": lambda: to.copy_(x)}
    for codec in ("sq127", "sq15"):
        codes = quantize_blockwise(x, codec)
        cases[f"quantise {codec}"] = functools.partial(quantize_blockwise, x, codec, out=codes)
        cases[f"dequantise {codec}"] = functools.partial(dequantize_blockwise, codes, out=to)
    fresh = "into fresh memory, whose first touch costs more than the arithmetic"
    cases |= {"clone": x.clone, "dequantise sq15, fresh": functools.partial(dequantize_blockwise, codes)}
    return against_first(cases, dict.fromkeys(("clone", "dequantise sq15, fresh"), fresh))


def losses(device: str) -> list[Row]:
    """Vocabulary loss, forward and backward, in bfloat16: torch's with logits first, memopt's without second."""
    from memopt.kernels import linear_cross_entropy

    hidden = torch.randn(TOKENS, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(VOCABULARY, WIDTH, device=device) * 0.02).to(torch.bfloat16).requires_grad_()
    target = torch.randint(VOCABULARY, (TOKENS,), device=device)

    def plain() -> None:
        torch.autograd.grad(F.cross_entropy((hidden @ weight.T).float(), target), (hidden, weight))

    def ours() -> None:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, target), (hidden, weight))

    return against_first({"torch, with logits": plain, "memopt linear_cross_entropy": ours})


TABLES: dict[str, Callable[[str], list[Row]]] = {
    "AdamW step": optimizers,
    "Block-wise quantisation": quantisers,
    "Vocabulary loss": losses,
}
