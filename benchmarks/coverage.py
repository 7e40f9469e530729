"""Memory, time and loss of the coverages on the demo's GPT: ``python -m benchmarks.coverage [--steps N] [--json F]``.

Every variant trains its own copy of one model on the same bytes, in turn in one process. The peak is that of one
metered step once states exist, states are the most of all steps, seconds the least, and the loss is the mean of the
last tenth. The first block-coordinate variant stays on one layer: its memory is that of any layer's visit.
Learning rates are the usual ones of each method, not tuned; figures compare memory first.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import memopt
from examples.gpt import GPT, GPTConfig, batches, read_text
from memopt.optim import AdamW, AdamW8bit, BlockCoordinate, LowRankDCT, Split, ZerothOrder, release_gradients

MIB = 2**20
CONFIG = GPTConfig(layers=6, width=384, heads=6, context=64)
BATCH = 2  # few activations: the peak is that of weights, gradients and states


def released(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = AdamW8bit(model.parameters(), lr=1e-3)
    release_gradients(optimizer)
    return optimizer


VARIANTS: dict[str, Callable[[nn.Module], Any]] = {
    "AdamW fp32": lambda m: AdamW(m.parameters(), lr=1e-3, state="fp32"),
    "AdamW 8bit": lambda m: AdamW8bit(m.parameters(), lr=1e-3),
    "AdamW 8bit, gradients released": released,
    "BlockCoordinate, AdamW 8bit": lambda m: BlockCoordinate(m, AdamW8bit, order="fixed", start=1, lr=1e-3),
    "BlockCoordinate random": lambda m: BlockCoordinate(m, AdamW8bit, switch_every=10, lr=1e-3),
    "BlockCoordinate greedy": lambda m: BlockCoordinate(m, AdamW8bit, switch_every=10, order="greedy", lr=1e-3),
    "Split 25 % by blocks": lambda m: Split(m, AdamW8bit, density=0.25, switch_every=50, rest_lr=0.3, lr=1e-3),
    "Split 25 % by columns": lambda m: Split(m, AdamW8bit, density=0.25, by="columns", rest_lr=0.3, lr=1e-3),
    "LowRankDCT rank 64": lambda m: LowRankDCT(m, AdamW8bit, rank=64, switch_every=50, lr=1e-3),
    "ZerothOrder": lambda m: ZerothOrder(m, lr=1e-6),
}


def step(model: nn.Module, optimizer: Any, inputs: tuple[Tensor, Tensor]) -> float:
    if isinstance(optimizer, ZerothOrder):
        return float(optimizer.step(lambda: model(*inputs)))
    loss = model(*inputs)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def measure(name: str, steps: int) -> dict[str, Any]:
    gc.collect()  # models of earlier variants hang in cycles of hooks
    torch.manual_seed(0)
    model = GPT(CONFIG)
    optimizer = VARIANTS[name](model)
    data = batches(read_text(None), BATCH, CONFIG.context, 0)
    step(model, optimizer, next(data))
    with memopt.meter() as meter:
        step(model, optimizer, next(data))
    losses, seconds, state = [], [], 0
    for _ in range(steps):
        inputs = next(data)
        start = time.perf_counter()
        losses.append(step(model, optimizer, inputs))
        seconds.append(time.perf_counter() - start)
        state = max(state, optimizer.state_bytes())
    last = losses[-max(1, steps // 10) :]
    return {
        "name": name,
        "state_bytes_per_parameter": state / sum(p.numel() for p in model.parameters()),
        "gradient_bytes": meter.by_category.get("gradients", 0),
        "peak_bytes": meter.peak_bytes,
        "step_seconds": min(seconds),
        "loss": sum(last) / len(last),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="timed steps per variant")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    rows = []
    print(f"{'':32} {'state B/param':>13} {'gradients MiB':>13} {'peak MiB':>9} {'s/step':>7} {'loss':>7}")
    for name in VARIANTS:
        rows.append(row := measure(name, arguments.steps))
        print(
            f"{name:32} {row['state_bytes_per_parameter']:13.3f} {row['gradient_bytes'] / MIB:13.1f} "
            f"{row['peak_bytes'] / MIB:9.1f} {row['step_seconds']:7.3f} {row['loss']:7.3f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"steps": arguments.steps, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
