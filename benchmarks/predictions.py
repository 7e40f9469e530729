"""Predicted against metered peaks on the CPU: six kinds of models, plain AdamW, AdamW8bit and with a plan applied.

python -m benchmarks.predictions [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memopt
from memopt.optim import AdamW8bit
from tests.planner import nets

TOKENS = torch.arange(8 * 128).reshape(8, 128) % 1000
IMAGES = torch.linspace(-1, 1, 8 * 3 * 64 * 64).reshape(8, 3, 64, 64)
LABELS = torch.arange(8)


@dataclass(frozen=True)
class Case:
    """A model with a batch; its output is a loss, has one, or becomes one through ``loss_fn``."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Any
    loss_fn: Callable[[Any], Tensor] | None = None

    def loss(self, output: Any) -> Tensor:
        if self.loss_fn is not None:
            return self.loss_fn(output)
        return output.loss if hasattr(output, "loss") else output


@dataclass(frozen=True)
class Row:
    model: str
    setting: str
    predicted_bytes: int
    metered_bytes: int
    trace_seconds: float

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.metered_bytes - 1


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 1000, "d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 4, "num_heads": 4}
    # A key-value cache, kept by default even in training, makes a block's replay differ from its forward.
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
    """The second of two steps."""

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


def rows(case: Case) -> Iterator[Row]:
    for setting, make_optimizer in (("AdamW", torch.optim.AdamW), ("AdamW8bit", AdamW8bit)):
        model = case.make()
        optimizer = make_optimizer(model.parameters(), lr=1e-3)
        start = time.perf_counter()
        traced = memopt.trace(model, case.inputs, case.loss_fn, optimizer)
        seconds = time.perf_counter() - start
        yield Row(case.name, setting, traced.peak_bytes, metered(case, model, optimizer), seconds)
    plan = memopt.plan(traced, budget=int(traced.peak_bytes * 0.8), hardware="cpu")
    if plan.blocks:
        with memopt.apply(model, plan):
            yield Row(case.name, "AdamW8bit, plan at 80 %", plan.peak_bytes, metered(case, model, optimizer), seconds)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    chosen = options.parse_args()
    found = []
    print(f"{'model':20} {'setting':24} {'predicted MiB':>14} {'metered MiB':>12} {'error':>8} {'trace s':>8}")
    for case in CASES:
        for row in rows(case):
            found.append(row)
            predicted, measured = row.predicted_bytes / 2**20, row.metered_bytes / 2**20
            print(
                f"{row.model:20} {row.setting:24} {predicted:14.2f} {measured:12.2f} {row.error:8.2%} "
                f"{row.trace_seconds:8.2f}",
                flush=True,
            )
    print(f"largest error {max(abs(row.error) for row in found):.2%}")
    if chosen.json is not None:
        machine = {"date": date.today().isoformat(), "torch": torch.__version__, "machine": platform.machine()}
        chosen.json.write_text(json.dumps({**machine, "rows": [asdict(row) for row in found]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
