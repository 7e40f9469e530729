"""What low-bit states cost in quality: least squares, heavy-tailed gradients, and a byte-level GPT."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from examples.gpt import GPT, GPTConfig, batches, read_text
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


def gpt_loss(state: str, seed: int, steps: int, dtype: str, layers: int, width: int) -> float:
    """Mean training loss of the last tenth of the steps of a byte-level GPT."""
    torch.manual_seed(seed)
    config = GPTConfig(layers=layers, width=width, heads=max(1, width // 64), context=128)
    model = GPT(config)
    rounding = "nearest"
    if dtype == "bf16":
        model, rounding = model.to(torch.bfloat16), "stochastic"
    optimizer = AdamW(model.parameters(), lr=1e-3, state=state, seed=seed, param_rounding=rounding)
    losses = []
    text = read_text(None)
    for _, (inputs, targets) in zip(range(steps), batches(text, 8, config.context, seed), strict=False):
        optimizer.zero_grad()
        logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return statistics.mean(losses[-max(1, steps // 10) :])


def gpt(
    steps: int, seeds: int, dtype: str, formats: list[str] | None, *, layers: int, width: int
) -> dict[str, dict[str, Any]]:
    """Final losses by format, fp32 first, and their mean's ratio to fp32's."""
    chosen = formats or [name for name in names() if name != "fp32"]
    found: dict[str, dict[str, Any]] = {}
    for state in ["fp32", *(one for one in chosen if one != "fp32")]:
        losses = [gpt_loss(state, seed, steps, dtype, layers, width) for seed in range(seeds)]
        found[state] = {"losses": losses, "mean": statistics.mean(losses)}
        found[state]["ratio"] = found[state]["mean"] / found["fp32"]["mean"]
        print_gpt({state: found[state]})
    return found


def print_gpt(found: dict[str, dict[str, Any]]) -> None:
    """One line a format."""
    for state, row in found.items():
        losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
        print(f"{state:14} mean {row['mean']:.4f}  ratio to fp32 {row['ratio']:.4f}  ({losses})", flush=True)
