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
from collections.abc import Sequence
from pathlib import Path

import torch

import memopt
from examples.gpt import GPT, GPTConfig
from memopt.planner import Buffer, Trace, place
from memopt.planner.placement import find_fault, max_live, read_csv, two_levels
from tests.planner.placement_cases import planted, scattered

SEEDS = 8
# minimalloc 9f5cf81 built natively, seconds of one run on 2 cores, for comparison.
MINIMALLOC_SECONDS = dict(zip("ABCDEFGHIJK", (6.1, 4.3, 0.8, 4.3, 3.6, 5.8, 1.2, 1.7, 4.6, 1.6, 0.5), strict=True))


def main() -> None:
    """Prints one line an instance."""
    parser = argparse.ArgumentParser(description="seconds and quality of address planning")
    parser.add_argument("folder", nargs="?", type=Path, help="minimalloc CSV files, NAME.CAPACITY.csv")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--time-limit", type=float, default=60.0)
    arguments = parser.parse_args()
    place([Buffer(0, 1, 1)], methods=["search"])
    place(planted(0, 20, 99), methods=["search"])  # compiles and loads the native code outside the measurement
    print(
        f"{'instance':30} {'n':>5} {'placed':>7} {'median s':>9} {'max s':>7} {'over max-live':>13} proven minimalloc s"
    )
    traces = {layers: traced(layers) for layers in (1, 4, 12)}
    for layers, trace in traces.items():
        show(f"GPT step, {layers} layers", buffers_of(trace), None, 1, arguments.time_limit)
    for seed in range(5):
        show(f"random {seed}", scattered(seed, 200), None, 1, arguments.time_limit)
    for count in (100, 200, 300):
        for cuts in (0.4, 0.6):
            name = f"planted {count}, {cuts:.0%} time cuts"
            show(name, planted(count, count, 1 << 20, cut_time=cuts), 1 << 20, arguments.seeds, arguments.time_limit)
    for file in sorted(arguments.folder.glob("*.csv")) if arguments.folder else ():
        numbers = [int(part) for part in file.name.split(".") if part.isdigit()]
        show(file.stem, read_csv(file), numbers[-1] if numbers else None, arguments.seeds, arguments.time_limit)
    print("\ntwo levels (each layer's forward and backward first) against flat, peak in bytes")
    for layers, trace in traces.items():
        show_levels(f"GPT step, {layers} layers", trace)


def traced(layers: int) -> Trace:
    """A training step of a small GPT with AdamW."""
    model = GPT(GPTConfig(layers, 256, 8, 128))
    tokens = torch.zeros(4, 128, dtype=torch.long)
    return memopt.trace(model, (tokens, tokens), optimizer=torch.optim.AdamW(model.parameters()))


def buffers_of(trace: Trace) -> list[Buffer]:
    """The storages of a trace as buffers."""
    return [Buffer(s.birth, s.death, s.bytes, s.name) for s in trace.storages if s.birth < s.death]


def show(name: str, buffers: Sequence[Buffer], capacity: int | None, seeds: int, time_limit: float) -> None:
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
    proven = sum(answer.proven for answer in answers)
    theirs = MINIMALLOC_SECONDS.get(name.split(".")[0], "")
    print(
        f"{name:30} {len(buffers):5} {placed:2} of {seeds:1} {statistics.median(seconds):9.3f} {max(seconds):7.2f} "
        f"{over:13.2%} {proven} of {seeds}  {theirs}",
        flush=True,
    )


def show_levels(name: str, trace: Trace) -> None:
    """MEMO's two levels over the traced blocks, against the flat placement."""
    buffers = buffers_of(trace)
    windows = sorted({window for block in trace.blocks for window in (block.forward, block.backward)})
    disjoint = [w for i, w in enumerate(windows) if w[0] < w[1] and (i == 0 or w[0] >= windows[i - 1][1])]
    offsets = two_levels(buffers, disjoint)
    if find_fault(buffers, offsets) is not None:
        sys.exit(f"{name}: overlapping buffers")
    peak = max(offset + buffer.size for offset, buffer in zip(offsets, buffers, strict=True))
    flat = place(buffers).peak
    print(f"{name:30} two levels {peak}, flat {flat}: {peak / flat - 1:+.2%}")


if __name__ == "__main__":
    main()
