"""What carrying a plan out costs, and whether it keeps its promise: time per operation and step, metered peaks.

python -m benchmarks.offload [--quick] [--save] [--part overhead|steps|sweep]

All variants of a table take turns within one process, and the smallest of their CPU times is reported, so that other
work on the machine disturbs little; waiting for a disk is not in it. Memory is the metered peak of a whole step.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import memopt
from benchmarks.offload_plans import Step, Switch, Trained, actions_by, everything, timed
from benchmarks.results import save
from examples.gpt import GPTConfig
from memopt.planner import Plan, plan, trace
from memopt.planner.values import Action

MIB = 2**20
EXACT = (Action.SWAP, Action.RECOMPUTE)
SWEPT = GPTConfig(layers=12, width=128, heads=4, context=256)
Rows = list[dict[str, Any]]


def cheap(path: str, name: str, size: int) -> Action:
    """Recompute what takes no matrix product."""
    return Action.KEEP if any(part in name for part in ("mm", "attention", "conv")) else Action.RECOMPUTE


def budgets(trained: Trained) -> tuple[Any, int, int, int]:
    """The trace of a step, and bytes: without activations (weights and gradients), the least that fits, plain."""
    traced = trace(trained.model, (trained.tokens, trained.tokens), optimizer=trained.optimizer)
    fixed = 2 * sum(parameter.nbytes for parameter in trained.model.parameters())
    smallest = plan(traced, fixed, "cpu", actions=EXACT, time_limit=5).smallest_budget_bytes
    assert smallest is not None
    return traced, fixed, smallest, traced.peak_bytes


def counted(found: Plan) -> str:
    """How many saved storages, block inputs among them, each action takes."""
    actions = [a for block in found.blocks for a in (*block.actions, *block.inputs)]
    return ", ".join(f"{kind.value} {count}" for kind in Action if (count := sum(a.action is kind for a in actions)))


def overhead(quick: bool) -> tuple[str, Rows]:
    """Microseconds per forward operation, on a model whose arithmetic costs next to nothing."""
    trained = Trained(GPTConfig(layers=4, width=16, heads=2, context=8, vocabulary=16), 1)
    model, templates = trained.model, trained.templates()
    operations = sum(len(template.ops) for template in templates.values())
    hooks = torch.autograd.graph.saved_tensors_hooks
    variants: dict[str, tuple[Any, Step]] = {
        "plain": (nullcontext(), trained.step),
        "identity hooks": (hooks(lambda t: t, lambda t: t), trained.step),
        "checkpoint every block": (nullcontext(), trained.step_checkpointed),
        "keep everything": (Switch(model, everything(templates, Action.KEEP)), trained.step),
        "recompute everything": (Switch(model, everything(templates, Action.RECOMPUTE)), trained.step),
        "recompute what is cheap": (Switch(model, actions_by(templates, cheap)), trained.step),
        "swap everything (disk)": (Switch(model, everything(templates, Action.SWAP)), trained.step),
    }
    best = timed(variants, 30 if quick else 150)
    rows = [
        {
            "variant": name,
            "step, CPU ms": seconds * 1e3,
            "over plain, µs per operation": (seconds - best["plain"]) / operations * 1e6,
        }
        for name, seconds in best.items()
    ]
    return f"Overhead per forward operation of a block ({operations} operations, forward and backward)", rows


def steps(quick: bool) -> tuple[str, Rows]:
    """Time and metered peak of a step under plans for half of the activations, against checkpointing."""
    rows: Rows = []
    for title, config, rounds in (("12 x 128", SWEPT, 5), ("demo, 6 x 512", GPTConfig(), 4))[: 1 if quick else 2]:
        trained = Trained(config, 4)
        model, templates = trained.model, trained.templates()
        traced, fixed, _, plain = budgets(trained)
        half = plan(traced, fixed + (plain - fixed) // 2, "cpu", actions=EXACT, time_limit=5)
        variants: dict[str, tuple[Any, Step]] = {
            "plain": (nullcontext(), trained.step),
            "checkpoint every block": (nullcontext(), trained.step_checkpointed),
            "keep everything": (Switch(model, everything(templates, Action.KEEP)), trained.step),
            f"plan for 50 % ({counted(half)})": (Switch(model, half), trained.step),
        }
        if config is SWEPT:  # ten times as fast as the demo
            variants |= {
                "recompute everything": (Switch(model, everything(templates, Action.RECOMPUTE)), trained.step),
                "swap everything (disk)": (Switch(model, everything(templates, Action.SWAP)), trained.step),
            }
        best = timed(variants, 3 if quick else rounds)
        for name, (context, step) in variants.items():
            with context:
                peak = trained.peak_bytes(step)
            rows.append(
                {
                    "GPT": title,
                    "variant": name,
                    "step, CPU ms": best[name] * 1e3,
                    "of plain": best[name] / best["plain"],
                    "of checkpointing": best[name] / best["checkpoint every block"],
                    "peak, MiB": peak / MIB,
                }
            )
    return "Steps at half of the plain activations", rows


def sweep(quick: bool) -> tuple[str, Rows]:
    """Planned and metered peaks from the plain peak down to the smallest feasible."""
    trained = Trained(SWEPT, 2 if quick else 4)
    traced, fixed, smallest, plain = budgets(trained)
    rows: Rows = []
    for share in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0):
        budget = int(smallest + share * (plain - smallest))
        found = plan(traced, budget, "cpu", actions=EXACT, time_limit=5)
        with memopt.apply(trained.model, found):
            trained.step()
            metered = trained.peak_bytes(trained.step)
        rows.append(
            {
                "budget, MiB": budget / MIB,
                "of the plain activations, %": 100 * (budget - fixed) / (plain - fixed),
                "planned peak, MiB": found.peak_bytes / MIB,
                "metered peak, MiB": metered / MIB,
                "metered over planned, %": 100 * (metered / found.peak_bytes - 1),
                "plan": counted(found),
            }
        )
    size = f"{SWEPT.layers} layers of width {SWEPT.width}, {len(trained.tokens)} x {SWEPT.context} tokens"
    return f"Budget sweep of a GPT, {size}; weights and gradients {fixed / MIB:.1f} MiB", rows


PARTS = {"overhead": overhead, "steps": steps, "sweep": sweep}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="only this table")
    parser.add_argument("--quick", action="store_true", help="smaller and fewer rounds")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()
    console = Console()
    for name, part in PARTS.items():
        if options.part in (None, name):
            title, rows = part(options.quick)
            table = Table(*rows[0], title=title)
            for row in rows:
                table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
            console.print(table)
            if options.save:
                command = f"`python -m benchmarks.offload --part {name}{' --quick' if options.quick else ''}`"
                console.print(*map(str, save(f"offload-{name}", title, rows, [command])))


if __name__ == "__main__":
    main()
