"""Address planning: seconds to a placement, how far from max-live, and whether it is proven.

    python -m benchmarks.placement            traced GPTs, random and planted instances, the two-level form's loss
    python -m benchmarks.placement FOLDER     and every minimalloc CSV in it, within its capacity

A CSV's capacity is the number in its name (``A.1048576.csv``). Seconds are CPU seconds of one core, over 8 seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import memopt
from benchmarks.results import save, show
from examples.gpt import GPT, GPTConfig
from memopt.planner import Buffer, Trace, place
from memopt.planner.placement import find_fault, max_live, read_csv, two_levels
from tests.planner.placement_cases import planted, scattered

SEEDS = 8
LAYERS = (1, 4, 12)
# minimalloc 9f5cf81 built natively, seconds of one run on 2 cores, for comparison.
MINIMALLOC_SECONDS = dict(zip("ABCDEFGHIJK", (6.1, 4.3, 0.8, 4.3, 3.6, 5.8, 1.2, 1.7, 4.6, 1.6, 0.5), strict=True))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="seconds and quality of address planning")
    parser.add_argument("folder", nargs="?", type=Path, help="minimalloc CSV files, NAME.CAPACITY.csv")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--time-limit", type=float, default=60.0)
    parser.add_argument("--save", action="store_true", help="keep the figures under benchmarks/results")
    arguments = parser.parse_args()
    place([Buffer(0, 1, 1)], methods=["search"])
    place(planted(0, 20, 99), methods=["search"])  # compiles and loads the native code outside the measurement
    rows = list(instances(arguments.folder, arguments.seeds, arguments.time_limit))
    notes = ["python -m benchmarks.placement FOLDER", "CPU seconds of one core; minimalloc: its native build, one run"]
    show("address planning", rows)
    levels = [two_level_row(f"GPT step, {layers} layers", traced(layers)) for layers in LAYERS]
    show("two levels (each layer's forward and backward first) against flat", levels)
    if arguments.save:
        save("placement", "Address planning", [*rows, *levels], notes)


def instances(folder: Path | None, seeds: int, limit: float) -> Iterator[dict[str, Any]]:
    """One row an instance: traced GPTs, random and planted ones, and every minimalloc CSV of the folder."""
    for layers in LAYERS:
        yield row(f"GPT step, {layers} layers", buffers_of(traced(layers)), None, 1, limit)
    for seed in range(5):
        yield row(f"random {seed}", scattered(seed, 200), None, 1, limit)
    for count in (100, 200, 300):
        for cuts in (0.4, 0.6):
            name = f"planted {count}, {cuts:.0%} time cuts"
            yield row(name, planted(count, count, 1 << 20, cut_time=cuts), 1 << 20, seeds, limit)
    for file in sorted(folder.glob("*.csv")) if folder else ():
        numbers = [int(part) for part in file.name.split(".") if part.isdigit()]
        yield row(file.stem, read_csv(file), numbers[-1] if numbers else None, seeds, limit)


def traced(layers: int) -> Trace:
    """A training step of a small GPT with AdamW."""
    model = GPT(GPTConfig(layers, 256, 8, 128))
    tokens = torch.zeros(4, 128, dtype=torch.long)
    return memopt.trace(model, (tokens, tokens), optimizer=torch.optim.AdamW(model.parameters()))


def buffers_of(trace: Trace) -> list[Buffer]:
    """The storages of a trace as buffers."""
    return [Buffer(s.birth, s.death, s.bytes, s.name) for s in trace.storages if s.birth < s.death]


def row(name: str, buffers: Sequence[Buffer], capacity: int | None, seeds: int, time_limit: float) -> dict[str, Any]:
    """The placements of one instance over the seeds."""
    answers = []
    seconds = []
    for seed in range(seeds):
        begin = time.process_time()
        answer = place(buffers, capacity, seed=seed, time_limit=time_limit)
        seconds.append(time.process_time() - begin)
        if answer.offsets and find_fault(buffers, answer.offsets, capacity) is not None:
            sys.exit(f"{name}, seed {seed}: overlapping buffers")
        answers.append(answer)
    placed = sum(answer.status.value == "placed" for answer in answers)
    over = max(answer.peak for answer in answers) / max_live(buffers) - 1
    return {
        "instance": name,
        "buffers": len(buffers),
        "placed": f"{placed} of {seeds}",
        "median s": round(statistics.median(seconds), 3),
        "longest s": round(max(seconds), 2),
        "over max-live": f"{over:.2%}",
        "proven": f"{sum(answer.proven for answer in answers)} of {seeds}",
        "minimalloc s": MINIMALLOC_SECONDS.get(name.split(".")[0]),
    }


def two_level_row(name: str, trace: Trace) -> dict[str, Any]:
    """MEMO's two levels over the traced blocks, against the flat placement."""
    buffers = buffers_of(trace)
    windows = sorted({window for block in trace.blocks for window in (block.forward, block.backward)})
    disjoint = [w for i, w in enumerate(windows) if w[0] < w[1] and (i == 0 or w[0] >= windows[i - 1][1])]
    offsets = two_levels(buffers, disjoint)
    if find_fault(buffers, offsets) is not None:
        sys.exit(f"{name}: overlapping buffers")
    peak = max(offset + buffer.size for offset, buffer in zip(offsets, buffers, strict=True))
    flat = place(buffers).peak
    return {"instance": f"{name}, two levels", "peak": peak, "flat": flat, "loss": f"{peak / flat - 1:+.2%}"}


if __name__ == "__main__":
    main()
