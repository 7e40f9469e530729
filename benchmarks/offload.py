"""What carrying a plan out costs: time per operation, per step, and memory.

Run as ``python -m benchmarks.offload``. All variants of a table take turns within one process, and the smallest of
their times is reported, so that other work on the machine disturbs little. Memory is the metered peak of a step.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memopt
from examples.gpt import GPT, GPTConfig
from memopt.offload import apply
from memopt.offload.template import Kind, Template
from memopt.planner.values import Action, BlockPlan, StorageAction

MIB = 2**20
Step = Callable[[], None]


def block_templates(model: nn.Module, step: Step, paths: list[str]) -> dict[str, Template]:
    """What each block saves, seen while a plan that keeps everything runs once."""
    with apply(model, plan_of(dict.fromkeys(paths, ()))) as handle:
        step()
        return {planned.path: template for planned in handle.blocks if (template := planned._templates[0])}


def plan_of(actions: dict[str, tuple[StorageAction, ...]], tier: str = "disk") -> Any:
    """A plan by hand."""
    return SimpleNamespace(blocks=tuple(BlockPlan(p, 0, "", a) for p, a in actions.items()), swap_tier=tier)


def actions_by(templates: dict[str, Template], choose: Callable[[str, str, int], Action]) -> Any:
    """A plan from a function of (block path, name of the operation that makes the storage, its bytes)."""
    actions = {}
    for path, template in templates.items():
        births = template.births()
        actions[path] = tuple(
            StorageAction(
                n, template.sizes[s], choose(path, template.ops[births[s][0]].func.__name__, template.sizes[s])
            )
            for n, s in enumerate(template.saved)
            if template.kinds[s] is Kind.MADE
        )
    return plan_of(actions)


def timed(variants: dict[str, tuple[Any, Step]], rounds: int) -> dict[str, float]:
    """The least seconds of each variant's step; ``variants`` are (context manager factory, step)."""
    best = dict.fromkeys(variants, float("inf"))
    for n in range(rounds + 2):
        for name, (context, step) in variants.items():
            with context():
                step()  # the first step under a fresh plan records
                began = time.process_time()
                step()
                spent = time.process_time() - began
            if n >= 2:
                best[name] = min(best[name], spent)
    return best


def peak(model: nn.Module, step: Step) -> int:
    """The metered peak of the second step."""
    step()
    gc.collect()
    with memopt.meter(model) as meter:
        step()
    return int(meter.peak_bytes)


def checkpointed(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """The model's forward with every block checkpointed."""
    x = model.token(tokens) + model.position.weight[: tokens.shape[1]]
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return F.cross_entropy(model.head(model.norm(x)).flatten(0, -2), targets.flatten())


def overhead(console: Console) -> None:
    """Microseconds per forward operation, on a model whose arithmetic costs next to nothing."""
    model = GPT(GPTConfig(layers=4, width=16, heads=2, context=8, vocabulary=16))
    tokens = torch.randint(16, (1, 8))

    def step() -> None:
        model(tokens, tokens).backward()
        model.zero_grad(set_to_none=True)

    def step_checkpointed() -> None:
        checkpointed(model, tokens, tokens).backward()
        model.zero_grad(set_to_none=True)

    paths = [f"blocks.{n}" for n in range(4)]
    templates = block_templates(model, step, paths)
    operations = sum(len(template.ops) for template in templates.values())
    hooks = torch.autograd.graph.saved_tensors_hooks
    plans = {
        "keep everything": actions_by(templates, lambda path, name, size: Action.KEEP),
        "recompute everything": actions_by(templates, lambda path, name, size: Action.RECOMPUTE),
        "recompute what is cheap": actions_by(templates, cheap),
        "swap everything (disk)": actions_by(templates, lambda path, name, size: Action.SWAP),
    }
    variants: dict[str, tuple[Any, Step]] = {
        "plain": (nullcontext, step),
        "identity hooks": (lambda: hooks(lambda t: t, lambda t: t), step),
        "checkpoint every block": (nullcontext, step_checkpointed),
    }
    handles = {}
    for name, plan in plans.items():
        handles[name] = Switch(model, plan)
        variants[name] = (handles[name], step)
    best = timed(variants, 60)
    table = Table(title=f"Overhead per forward operation of a block ({operations} operations, forward and backward)")
    table.add_column("variant")
    table.add_column("step, ms", justify="right")
    table.add_column("over plain, µs per operation", justify="right")
    for name, seconds in best.items():
        extra = (seconds - best["plain"]) / operations * 1e6
        table.add_row(name, f"{seconds * 1e3:.3f}", f"{extra:.1f}")
    console.print(table)


class Switch:
    """Applies a plan for each use; its recorded calls are kept from use to use, so that only the first one records."""

    def __init__(self, model: nn.Module, plan: Any) -> None:
        self.model, self.plan = model, plan
        self.handle = apply(model, plan)
        self.handle.remove()

    def __call__(self) -> Switch:
        return self

    def __enter__(self) -> None:
        for planned in self.handle.blocks:
            planned.calls = 0
            planned.block.forward = planned

    def __exit__(self, *error: Any) -> None:
        for planned in self.handle.blocks:
            planned.restore()


def cheap(path: str, name: str, size: int) -> Action:
    """Recompute what takes no matrix product."""
    return Action.KEEP if any(part in name for part in ("mm", "attention", "conv")) else Action.RECOMPUTE


def demo(console: Console) -> None:
    """The demo model: time of a step and metered peak under several plans."""
    config = GPTConfig(layers=6, width=512, heads=8, context=256)
    model = GPT(config)
    tokens = torch.randint(256, (4, 256))

    def step() -> None:
        model(tokens, tokens).backward()
        model.zero_grad(set_to_none=True)

    def step_checkpointed() -> None:
        checkpointed(model, tokens, tokens).backward()
        model.zero_grad(set_to_none=True)

    paths = [f"blocks.{n}" for n in range(config.layers)]
    templates = block_templates(model, step, paths)
    saved = sum(t.sizes[s] for t in templates.values() for s in t.saved)
    plans = {
        "keep everything": actions_by(templates, lambda path, name, size: Action.KEEP),
        "recompute what is cheap": actions_by(templates, cheap),
        "half of the bytes recomputed": half(templates),
        "recompute everything": actions_by(templates, lambda path, name, size: Action.RECOMPUTE),
        "swap everything (disk)": actions_by(templates, lambda path, name, size: Action.SWAP),
    }
    variants: dict[str, tuple[Any, Step]] = {
        "plain": (nullcontext, step),
        "checkpoint every block": (nullcontext, step_checkpointed),
    }
    variants |= {name: (Switch(model, plan), step) for name, plan in plans.items()}
    best = timed(variants, 4)
    table = Table(title=f"GPT, 6 layers of width 512, 4 x 256 tokens; blocks save {saved / MIB:.0f} MiB")
    for column in ("variant", "step, ms", "of plain", "peak, MiB"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, (context, run) in variants.items():
        with context():
            highest = peak(model, run)
        table.add_row(name, f"{best[name] * 1e3:.1f}", f"{best[name] / best['plain']:.3f}", f"{highest / MIB:.1f}")
    console.print(table)


def half(templates: dict[str, Template]) -> Any:
    """Recompute the cheapest storages until half of the saved bytes are gone: what a 50 % budget asks for."""
    costs = {"gelu": 0, "native_layer_norm": 0, "mul": 0, "add": 0, "bernoulli_": 0}
    order = []
    for path, template in templates.items():
        births = template.births()
        for n, s in enumerate(template.saved):
            if template.kinds[s] is Kind.MADE:
                name = template.ops[births[s][0]].func.__name__.split(".")[0]
                order.append((costs.get(name, 1 + ("attention" in name)), path, n, template.sizes[s]))
    order.sort(key=lambda entry: (entry[0], -entry[3]))
    target = sum(entry[3] for entry in order) / 2
    chosen: dict[str, list[StorageAction]] = {path: [] for path in templates}
    for _, path, n, size in order:
        if target > 0:
            chosen[path].append(StorageAction(n, size, Action.RECOMPUTE))
            target -= size
    return plan_of({path: tuple(actions) for path, actions in chosen.items()})


def growth(console: Console, steps: int) -> None:
    """What the process holds before and after many steps of a random mixture of keep, swap and recompute."""
    model = GPT(GPTConfig(layers=3, width=64, heads=4, context=32, vocabulary=64, dropout=0.1))
    tokens = torch.randint(64, (4, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        model(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    paths = [f"blocks.{n}" for n in range(3)]
    draw = random.Random(0)
    exact = (Action.KEEP, Action.SWAP, Action.RECOMPUTE)
    plan = actions_by(block_templates(model, step, paths), lambda path, name, size: draw.choice(exact))
    table = Table(title=f"Held by the process over {steps} steps")
    for column in ("after step", "resident, MiB", "file handles", "Python objects", "swap file, KiB"):
        table.add_column(column, justify="right")
    with apply(model, plan) as handle:
        for n in range(steps + 1):
            step()
            if n in (10, steps // 4, steps // 2, steps):
                gc.collect()
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                held = (f"{resident / MIB:.1f}", len(os.listdir("/proc/self/fd")), len(gc.get_objects()))
                table.add_row(*map(str, (n, *held, handle.tier._end // 1024)))
    console.print(table)


def main(steps: int = typer.Option(2000, help="Steps of the growth table.")) -> None:
    """Print the tables."""
    console = Console()
    torch.manual_seed(0)
    overhead(console)
    demo(console)
    growth(console, steps)


if __name__ == "__main__":
    typer.run(main)
