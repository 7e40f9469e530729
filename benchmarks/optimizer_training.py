"""Final losses of the demo's byte-level GPT under every state format, and a file that keeps each finished run."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from examples.gpt import GPT, GPTConfig, batches, read_text
from memopt.optim import AdamW

LAST_STEPS = 20
HELD_OUT_BATCHES = 32


@dataclass(frozen=True)
class Case:
    """One training recipe: the demo's GPT (6 layers of width 512, 19 million parameters, unless said) by AdamW,
    warm-up over a tenth of the steps, then a cosine to 0; matrix products in bf16. ``dtype`` is that of the parameters;
    bf16 ones round stochastically.
    """

    title: str
    steps: int
    seeds: int
    batch: int
    context: int = 64
    dtype: str = "fp32"
    layers: int = 6
    width: int = 512
    lr: float = 3e-4


CASES = {
    "demo": Case("300 steps of 4 x 64 bytes, fp32 parameters", steps=300, seeds=3, batch=4),
    "small": Case("300 steps of 4 x 64 bytes, 3 layers of width 192", steps=300, seeds=3, batch=4, layers=3, width=192),
    "bf16": Case("the same, bf16 parameters", steps=300, seeds=3, batch=4, layers=3, width=192, dtype="bf16"),
    "long": Case(
        "3000 steps, 2 layers of width 128, lr 1e-3", steps=3000, seeds=1, batch=4, layers=2, width=128, lr=1e-3
    ),
    "tiny": Case("10 steps of a tiny model, to try this out", steps=10, seeds=1, batch=2, layers=1, width=64),
}
NUDGED = "fp32, nudged"
"""fp32 states and the blank's embedding longer by a ten-thousandth: what runs differ by when nothing matters."""


def train(case: Case, state: str, seed: int) -> dict[str, float]:
    """One run: its mean training loss over the last 20 steps, and its loss on held-out text; bytes, natural log."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(case.layers, case.width, max(1, case.width // 64), case.context))
    bf16 = case.dtype == "bf16"
    if bf16:
        model.to(torch.bfloat16)
    if state == NUDGED:
        model.token.weight.data[ord(" ")] *= 1 + 1e-4
    optimizer = AdamW(
        model.parameters(),
        lr=case.lr,
        state=state.removesuffix(", nudged"),
        seed=seed,
        param_rounding="stochastic" if bf16 else "nearest",
    )
    warm = max(1, case.steps // 10)

    def pace(step: int) -> float:
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / (case.steps - warm)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, pace)
    text = read_text(None)
    cut = len(text) * 9 // 10
    losses = []
    began = time.process_time()
    for _, (inputs, targets) in zip(
        range(case.steps), batches(text[:cut], case.batch, case.context, seed), strict=False
    ):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    seconds = time.process_time() - began
    held_out = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _, pair in zip(range(HELD_OUT_BATCHES), batches(text[cut:], 8, case.context, 0), strict=False):
            held_out.append(float(model(*pair)))
    return {
        "final_loss": statistics.mean(losses[-LAST_STEPS:]),
        "held_out_loss": statistics.mean(held_out),
        "step_seconds": seconds / case.steps,
    }


def run(names: list[str], states: list[str], file: Path) -> Iterator[dict[str, Any]]:
    """Every run that ``file`` does not hold yet, seed by seed; each is added to the file when it ends, then given."""
    file.parent.mkdir(exist_ok=True)
    done = load(file)
    for name in names:
        case = CASES[name]
        for seed in range(case.seeds):
            for state in states:
                key = {"case": name, "state": state, "seed": seed}
                if any(key.items() <= one.items() for one in done):
                    continue
                one = {**key, **train(case, state, seed), "recipe": asdict(case)}
                done = [*load(file), one]
                file.write_text(json.dumps(done, indent=1) + "\n")
                yield one


def load(file: Path) -> list[dict[str, Any]]:
    """The runs that a file holds; none where there is no file."""
    return json.loads(file.read_text()) if file.exists() else []


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per recipe and format, in the order of first runs: means over seeds, and their ratios to fp32 states'."""
    rows = []
    for name, state in dict.fromkeys((one["case"], one["state"]) for one in runs):
        mine = {one["seed"]: one for one in runs if one["case"] == name and one["state"] == state}
        base = {one["seed"]: one for one in runs if one["case"] == name and one["state"] == "fp32"}
        seeds = sorted(mine.keys() & base.keys())
        if not seeds:
            continue
        title = mine[seeds[0]]["recipe"]["title"]
        row: dict[str, Any] = {"case": name, "title": title, "state": state, "seeds": len(seeds)}
        for kind in ("final_loss", "held_out_loss"):
            mean = statistics.mean(mine[seed][kind] for seed in seeds)
            wide = statistics.mean(base[seed][kind] for seed in seeds)
            row |= {kind: mean, f"{kind}_ratio": mean / wide}
            row[f"{kind}_ratios"] = [mine[seed][kind] / base[seed][kind] for seed in seeds]
        rows.append(row)
    return rows
