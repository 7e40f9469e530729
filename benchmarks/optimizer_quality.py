"""What low-bit states cost in quality: least squares, heavy-tailed gradients, and a byte-level GPT.

    python -m benchmarks.optimizer_quality                            # the two probes, seconds
    python -m benchmarks.optimizer_quality --train demo bf16 long     # the GPT's runs, hours on two cores
    python -m benchmarks.optimizer_quality --states fp32 8bit         # these formats only

Training runs are kept one by one in the file that ``--runs`` names, and those it holds are not run again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import optimizer_training
from memopt.optim import AdamW
from memopt.optim.formats import names

LR = 1e-2


def least_squares(state: str, seed: int, lr: float = LR, steps: int = 300) -> float:
    """Final loss of ``|| x W - y ||^2`` with W of 64 x 128, which starts small and is well determined."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(256, 64, generator=generator)
    target = inputs @ torch.randn(64, 128, generator=generator) + torch.randn(256, 128, generator=generator)
    weight = nn.Parameter(torch.randn(64, 128, generator=generator) * 0.1)
    optimizer = AdamW([weight], lr=lr, state=state, seed=seed, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(inputs @ weight, target)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def heavy_tails(state: str, seed: int, lr: float = 1e-3, steps: int = 20) -> tuple[float, float]:
    """Mean and largest distance to fp32 states, in units of ``lr``, after steps of student-t gradients (2 degrees)."""
    final = []
    for kept in ("fp32", state):
        torch.manual_seed(seed)
        sampler = torch.distributions.StudentT(2.0)
        weight = nn.Parameter(torch.randn(256, 512))
        optimizer = AdamW([weight], lr=lr, state=kept, seed=seed)
        for _ in range(steps):
            weight.grad = sampler.sample(weight.shape)
            optimizer.step()
        final.append(weight.detach())
    distance = (final[0] - final[1]).abs() / lr
    return float(distance.mean()), float(distance.max())


def probes(formats: list[str] | None) -> dict[str, dict[str, float]]:
    """Both probes for every format; least squares as ratios to fp32, mean of 5 seeds."""
    chosen = formats or list(names())
    wide = {lr: statistics.mean(least_squares("fp32", seed, lr) for seed in range(5)) for lr in (1e-2, 3e-3)}
    found = {}
    for state in chosen:
        row = {
            f"least_squares_{lr:g}": statistics.mean(least_squares(state, seed, lr) for seed in range(5)) / wide[lr]
            for lr in wide
        }
        tails = [heavy_tails(state, seed) for seed in range(3)]
        row["heavy_tails_mean_lr"] = statistics.mean(mean for mean, _ in tails)
        row["heavy_tails_max_lr"] = max(largest for _, largest in tails)
        found[state] = row
    return found


def print_probes(found: dict[str, dict[str, float]]) -> None:
    """The probes as a table."""
    print(f"{'state':14}{'least squares lr 1e-2':>23}{'3e-3':>8}{'heavy tails mean/lr':>22}{'max/lr':>8}")
    for state, row in found.items():
        print(
            f"{state:14}{row['least_squares_0.01']:23.3f}{row['least_squares_0.003']:8.3f}"
            f"{row['heavy_tails_mean_lr']:22.3f}{row['heavy_tails_max_lr']:8.1f}"
        )


def print_training(rows: list[dict[str, Any]]) -> None:
    """The GPT's runs as a table."""
    print(f"{'recipe':8}{'state':14}{'seeds':>6}{'final loss':>12}{'ratio':>9}{'held-out':>10}{'ratio':>9}  per seed")
    for row in rows:
        each = " ".join(f"{ratio:.4f}" for ratio in row["final_loss_ratios"])
        print(
            f"{row['case']:8}{row['state']:14}{row['seeds']:6}{row['final_loss']:12.4f}{row['final_loss_ratio']:9.4f}"
            f"{row['held_out_loss']:10.4f}{row['held_out_loss_ratio']:9.4f}  {each}"
        )


def main() -> None:
    """Parses the options, runs what they ask for and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", nargs="+", choices=names(), default=list(names()))
    parser.add_argument("--train", nargs="+", choices=list(optimizer_training.CASES), default=[])
    parser.add_argument("--runs", type=Path, default=Path("optimizer-quality-runs.json"), help="kept training runs")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.train:
        print_probes(probes(options.states))
    for one in optimizer_training.run(options.train, options.states, options.runs):
        print(f"{one['case']} {one['state']} seed {one['seed']}: {one['final_loss']:.4f}", flush=True)
    if options.runs.exists():
        print_training(optimizer_training.summary(optimizer_training.load(options.runs)))


if __name__ == "__main__":
    main()
