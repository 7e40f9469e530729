"""What low-bit states cost in quality: least squares, heavy-tailed gradients, and a byte-level GPT.

    python -m benchmarks.optimizer_quality                            # the two probes, and the training runs kept
    python -m benchmarks.optimizer_quality --train demo bf16 long     # the GPT's runs first, hours on two cores
    python -m benchmarks.optimizer_quality --states fp32 8bit         # these formats only

Training runs are kept one by one in the file that ``--runs`` names, and those it holds are not run again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from benchmarks import optimizer_training
from benchmarks.results import save
from memopt.optim import AdamW
from memopt.optim.formats import names

LR = 1e-2
RUNS = Path(__file__).parent / "results" / "optimizer-quality-runs.json"
STATES = ["fp32", optimizer_training.NUDGED, *(name for name in names() if name != "fp32")]
NOTE = (
    "`python -m benchmarks.optimizer_quality --train demo small bf16 long --save`; AdamW; ratios of mean losses over "
    "seeds with the same data and first weights; the GPT of examples/gpt.py (6 layers of width 512 unless said), "
    "lr 3e-4 unless said, warm-up over a tenth, cosine to 0, matrix products in bf16; bf16 parameters round "
    "stochastically. `fp32, nudged` starts with one embedding longer by a ten-thousandth: what is noise."
)


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


def rows_of(found: dict[str, dict[str, float]], training: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per recipe and format: ratios to fp32 states, or for heavy tails distances in units of lr."""
    titles = {
        "heavy_tails_mean_lr": "heavy tails, mean distance / lr",
        "heavy_tails_max_lr": "heavy tails, largest / lr",
    }
    titles |= {f"least_squares_{lr}": f"least squares, lr {lr}, final loss / fp32" for lr in ("0.01", "0.003")}
    rows = [
        {"run": title, "state": state, "seeds": 3 if "heavy" in key else 5, "figure": f"{row[key]:.4f}"}
        for key, title in titles.items()
        for state, row in found.items()
    ]
    for row in training:
        rows.append(
            {
                "run": f"GPT, {row['title']}: last {optimizer_training.LAST_STEPS} losses / fp32",
                "state": row["state"],
                "seeds": row["seeds"],
                "figure": f"{row['final_loss_ratio']:.4f}",
                "held-out loss / fp32": f"{row['held_out_loss_ratio']:.4f}",
                "loss": f"{row['final_loss']:.4f}",
                "each seed": " ".join(f"{ratio:.4f}" for ratio in row["final_loss_ratios"]),
            }
        )
    return rows


def main() -> None:
    """Parses the options, runs what they ask for and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", nargs="+", choices=STATES, default=STATES)
    parser.add_argument("--train", nargs="+", choices=list(optimizer_training.CASES), default=[])
    parser.add_argument("--runs", type=Path, default=RUNS, help="where training runs are kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="the tables under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for one in optimizer_training.run(options.train, options.states, options.runs):
        print(f"{one['case']} {one['state']} seed {one['seed']}: {one['final_loss']:.4f}", flush=True)
    kept = optimizer_training.load(options.runs)
    rows = rows_of(probes([state for state in options.states if state in names()]), optimizer_training.summary(kept))
    table = Table(title="Optimizer states in few bits against fp32 states", title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console(width=200).print(table)
    if options.save:
        print(*save("optimizer-quality", str(table.title), rows, [NOTE]))


if __name__ == "__main__":
    main()
