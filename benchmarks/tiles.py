"""What tiles gain and cost: smallest peaks planned and metered, and steps timed, for a small Llama on the CPU.

python -m benchmarks.tiles [--quick] [--save]
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch

import memopt
from benchmarks.results import save, show
from memopt.planner.models import find_model
from memopt.planner.models.reference_models import Decoder, DecoderConfig
from memopt.planner.variants import change

SIZES = DecoderConfig(layers=8, width=256, heads=8, mlp_width=1024, vocabulary=256, context=2048)
TILES = (1, 2, 4, 8, 16)


def smallest(quick: bool) -> list[dict[str, Any]]:
    """For each number of tiles the smallest plan by recomputing: planned and metered peak, and the step over plain."""
    torch.manual_seed(0)
    model = Decoder(SIZES)
    tokens = torch.randint(0, 256, (1, 256 if quick else 2048))
    inputs = (tokens, tokens)
    plans = {}
    for tiles in TILES[::2] if quick else TILES:
        step = memopt.trace(model, inputs, tiles=tiles)
        least = memopt.plan(step, 1, "cpu", actions=("recompute",)).smallest_budget_bytes
        plans[tiles] = memopt.plan(step, least, "cpu", actions=("recompute",))

    def step_seconds() -> float:
        began = time.process_time()
        model(*inputs).backward()
        spent = time.process_time() - began
        model.zero_grad()
        return spent

    spent: dict[int, list[float]] = {tiles: [] for tiles in (0, *plans)}
    peaks: dict[int, int] = {}
    for turn in range(3 if quick else 9):
        for tiles in spent:
            with memopt.apply(model, plans[tiles]) if tiles else nullcontext():
                if turn == 0:
                    step_seconds()
                    with memopt.meter(model) as meter:
                        model(*inputs).backward()
                    model.zero_grad()
                    peaks[tiles] = meter.peak_bytes
                step_seconds()
                spent[tiles].append(step_seconds())
    fixed = 2 * sum(p.nbytes for p in model.parameters())
    plain = statistics.median(spent[0])
    rows = [_row("plain", fixed, peaks[0], peaks[0], 1.0)]
    for tiles, plan in plans.items():
        rows.append(
            _row(f"{tiles} tiles", fixed, plan.peak_bytes, peaks[tiles], statistics.median(spent[tiles]) / plain)
        )
    return rows


def _row(step: str, fixed: int, planned: int, metered: int, ratio: float) -> dict[str, Any]:
    return {
        "step": step,
        "planned peak MiB": round(planned / 2**20, 2),
        "metered peak MiB": round(metered / 2**20, 2),
        "beyond weights and gradients MiB": round((metered - fixed) / 2**20, 2),
        "CPU time of plain": round(ratio, 3),
    }


def large(quick: bool) -> list[dict[str, Any]]:
    """The smallest budget of Llama-3-8B at 32768 tokens on an H100, logits by chunks, and the step there."""
    found = find_model("llama-3-8b", batch=1, tokens=8192 if quick else 32768)
    rows = []
    for tiles in (1, 8):
        step = memopt.trace(found.model, found.inputs, found.loss_fn, optimizer="adamw8bit", device="cuda", tiles=tiles)
        step = change("chunked loss").apply(step)
        plan = memopt.plan(step, "20GiB", "h100")
        rows.append(
            {
                "tiles": tiles,
                "smallest budget GiB": round((plan.smallest_budget_bytes or plan.peak_bytes) / 2**30, 2),
                "step there s": round(plan.step_seconds, 3),
            }
        )
    return rows


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and turns")
    parser.add_argument("--save", action="store_true", help="keep the figures under benchmarks/results")
    options = parser.parse_args()
    parts = {
        "smallest": (smallest, "smallest plan by recomputing, 8 layers of width 256, 2048 tokens, no optimizer"),
        "large": (large, "llama-3-8b at 32768 on h100, AdamW8bit, chunked loss"),
    }
    for name, (part, title) in parts.items():
        rows = part(options.quick)
        show(title, rows)
        if options.save:
            save(f"tiles-{name}", f"tiles: {title}", rows, ["python -m benchmarks.tiles"])


if __name__ == "__main__":
    main()
