"""Predicted against metered peaks on the CPU: six kinds of models, plain AdamW, AdamW8bit, and plans applied.

python -m benchmarks.predictions [--save]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memopt
from benchmarks.results import save, show
from memopt.optim import AdamW8bit
from memopt.planner import Plan, Status
from tests.planner import nets

TOKENS = torch.arange(8 * 128).reshape(8, 128) % 1000
IMAGES = torch.linspace(-1, 1, 8 * 3 * 64 * 64).reshape(8, 3, 64, 64)
LABELS = torch.arange(8)
BUDGETS = {"plan for 80 %": 0.8, "plan for 45 % or the least": 0.45}


@dataclass(frozen=True)
class Case:
    """A model with a batch; its output is a loss, has one, or becomes one through ``loss_fn``."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Any
    loss_fn: Callable[[Any], Tensor] | None = None

    def loss(self, output: Any) -> Tensor:
        """The scalar to differentiate."""
        if self.loss_fn is not None:
            return self.loss_fn(output)
        return output.loss if hasattr(output, "loss") else output


def t5() -> nn.Module:
    """A small T5 of transformers."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 1000, "d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 4, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, use_cache=False)).train()


CASES = [
    Case("GPT", lambda: nets.GPT(6, 128, 4, 1000), (TOKENS, TOKENS)),
    Case("ResNet", lambda: nets.ResNet((32, 64, 128), 3), (IMAGES,), lambda y: F.cross_entropy(y, LABELS)),
    Case("U-Net", lambda: nets.UNet((16, 32, 64)), (IMAGES,), lambda y: y.square().mean()),
    Case("ViT", lambda: nets.ViT(6, 128, 64, 8), (IMAGES,), lambda y: F.cross_entropy(y, LABELS)),
    Case("T5", t5, {"input_ids": TOKENS, "labels": TOKENS}),
    Case(
        "mixture of experts",
        lambda: nets.MixtureOfExperts(4, 128, 1000),
        (TOKENS,),
        lambda y: F.cross_entropy(y.flatten(0, 1), TOKENS.flatten()),
    ),
]


def metered(case: Case, model: nn.Module, optimizer: Any) -> int:
    """The peak of the second of two steps."""

    def step() -> None:
        optimizer.zero_grad()
        output = model(**case.inputs) if isinstance(case.inputs, dict) else model(*case.inputs)
        case.loss(output).backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    with memopt.meter(model, optimizer) as found:
        step()
    return found.peak_bytes


def rows(case: Case) -> Iterator[dict[str, Any]]:
    """One row for each setting."""

    def row(setting: str, predicted: int, peak: int) -> dict[str, Any]:
        return {
            "model": case.name,
            "setting": setting,
            "predicted MiB": round(predicted / 2**20, 2),
            "metered MiB": round(peak / 2**20, 2),
            "error": f"{predicted / peak - 1:+.2%}",
            "trace s": round(seconds, 2),
        }

    for setting, make_optimizer in (("AdamW", torch.optim.AdamW), ("AdamW8bit", AdamW8bit)):
        model = case.make()
        optimizer = make_optimizer(model.parameters(), lr=1e-3)
        start = time.process_time()
        traced = memopt.trace(model, case.inputs, case.loss_fn, optimizer)
        seconds = time.process_time() - start
        yield row(setting, traced.peak_bytes, metered(case, model, optimizer))
    for setting, share in BUDGETS.items():
        found: Plan = memopt.plan(traced, budget=int(traced.peak_bytes * share), hardware="cpu")
        if found.status is Status.INFEASIBLE:
            found = memopt.plan(traced, budget=found.smallest_budget_bytes, hardware="cpu")
        with memopt.apply(model, found):
            share = found.peak_bytes / traced.peak_bytes
            yield row(f"AdamW8bit, {setting} ({share:.0%})", found.peak_bytes, metered(case, model, optimizer))


def collect(quick: bool) -> list[dict[str, Any]]:
    """All rows; with ``quick`` of two models only."""
    return [row for case in (CASES[:2] if quick else CASES) for row in rows(case)]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two of the models")
    parser.add_argument("--save", action="store_true", help="keep the figures under benchmarks/results")
    options = parser.parse_args()
    title = "Predicted against metered peak, CPU"
    found = collect(options.quick)
    show(title, found, width=120)
    if options.save:
        save("predictions", title, found, ["python -m benchmarks.predictions"])


if __name__ == "__main__":
    main()
