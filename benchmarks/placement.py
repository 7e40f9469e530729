"""Address planning: seconds to a placement, how far from max-live, and whether it is proven.

    python -m benchmarks.placement                    generated instances only
    python -m benchmarks.placement FOLDER             and every minimalloc CSV in it, within its capacity

A CSV's capacity is the number in its name (``A.1048576.csv``). Times are CPU seconds of one core over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from memopt.planner import Buffer, Placement, place
from memopt.planner.placement import find_fault, max_live, read_csv
from tests.planner.placement_cases import planted, scattered, training_step

SEEDS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description="seconds and quality of address planning")
    parser.add_argument("folder", nargs="?", type=Path, help="minimalloc CSV files, NAME.CAPACITY.csv")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--time-limit", type=float, default=60.0)
    arguments = parser.parse_args()
    print(f"{'instance':28} {'n':>5} {'placed':>7} {'median s':>9} {'max s':>7} {'over max-live':>13} proven")
    for layers in (1, 4, 12, 50):
        show(f"training step, {layers} layers", training_step(layers), None, 1, arguments.time_limit)
    for seed in range(3):
        show(f"random {seed}", scattered(seed, 200), None, 1, arguments.time_limit)
    for count in (100, 200, 300):
        for cuts in (0.4, 0.6):
            name = f"planted {count}, {cuts:.0%} time cuts"
            show(name, planted(count, count, 1 << 20, cut_time=cuts), 1 << 20, arguments.seeds, arguments.time_limit)
    for file in sorted(arguments.folder.glob("*.csv")) if arguments.folder else ():
        numbers = [int(part) for part in file.name.split(".") if part.isdigit()]
        show(file.stem, read_csv(file), numbers[-1] if numbers else None, arguments.seeds, arguments.time_limit)


def show(name: str, buffers: Sequence[Buffer], capacity: int | None, seeds: int, time_limit: float) -> None:
    """One line: the placements of one instance over the seeds."""
    place([Buffer(0, 1, 1)], methods=["search"])  # compiles and loads the native code outside the measurement
    answers: list[Placement] = []
    seconds: list[float] = []
    for seed in range(seeds):
        begin = time.process_time()
        answer = place(buffers, capacity, seed=seed, time_limit=time_limit)
        seconds.append(time.process_time() - begin)
        if answer.offsets and find_fault(buffers, answer.offsets, capacity) is not None:
            sys.exit(f"{name}, seed {seed}: overlapping buffers")
        answers.append(answer)
    placed = sum(answer.status.value == "placed" for answer in answers)
    live = max_live(buffers)
    over = max(answer.peak for answer in answers) / live - 1
    proven = sum(answer.proven for answer in answers)
    print(
        f"{name:28} {len(buffers):5} {placed:3} of {seeds:1} {statistics.median(seconds):9.3f} {max(seconds):7.2f} "
        f"{over:12.2%}  {proven} of {seeds}",
        flush=True,
    )


if __name__ == "__main__":
    main()
