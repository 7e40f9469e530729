"""The planner's figures: predicted against metered peaks, planning time, budget sweep, other methods at equal budget.

python -m benchmarks.planner [--quick] [--part metered|time|sweep|methods]
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import memopt
from memopt.optim import make
from memopt.planner import Action, Plan, Status, Trace, find_model, format_bytes, plan, trace
from memopt.planner.baselines import BASELINES, baseline
from tests.planner.test_plan_metered import steps
from tests.planner.test_trace_peak import CASES

EXACT = (Action.SWAP, Action.RECOMPUTE)


def t5() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A small T5 of transformers and a batch."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=512,
        d_model=64,
        d_kv=16,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        use_cache=False,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    tokens = torch.arange(4 * 64).reshape(4, 64) % 500
    return T5ForConditionalGeneration(config), {"input_ids": tokens, "labels": tokens}


def metered(console: Console, quick: bool) -> None:
    """Predicted against metered peak: plain AdamW, AdamW8bit, and AdamW8bit with a plan, on the CPU."""
    table = Table("model", "AdamW", "AdamW8bit", "with a plan", "plan saves", title="Predicted / metered peak (CPU)")
    cases: dict[str, tuple[Callable[[], Any], Any, Any]] = {
        name: case
        for name, case in CASES.items()
        if name in ("resnet", "u-net", "vit", "mixture of experts") or "inside" in name
    }
    cases["t5"] = (lambda: t5()[0], t5()[1], None)
    for name, (make_model, inputs, loss_fn) in cases.items():
        ratios = []
        for build in (
            lambda m: torch.optim.AdamW(m.parameters()),
            lambda m: make("adamw8bit", m.parameters(), lr=1e-3),
        ):
            torch.manual_seed(0)
            model = make_model()
            optimizer = build(model)
            traced = trace(model, inputs, loss_fn=loss_fn, optimizer=optimizer)
            peak, _ = run(model, optimizer, inputs, loss_fn)
            ratios.append(traced.peak_bytes / peak)
        found = plan(traced, int(traced.peak_bytes * 0.75), "cpu", actions=EXACT)
        if found.status is Status.INFEASIBLE:
            found = plan(traced, found.smallest_budget_bytes, "cpu", actions=EXACT)
        torch.manual_seed(0)
        model = make_model()
        optimizer = make("adamw8bit", model.parameters(), lr=1e-3)
        with memopt.apply(model, found):
            with_plan, _ = run(model, optimizer, inputs, loss_fn)
        ratios.append(found.peak_bytes / with_plan)
        table.add_row(name, *(f"{ratio:.4f}" for ratio in ratios), f"{1 - with_plan / peak:.0%}")
    console.print(table)


def run(model: Any, optimizer: Any, inputs: Any, loss_fn: Any) -> tuple[int, Any]:
    """Two metered steps; the peak of the second."""
    if not isinstance(inputs, dict):
        return steps(model, optimizer, inputs, loss_fn)
    return steps(without_arguments(model, inputs), optimizer, (), lambda output: output.loss)


def without_arguments(model: Any, inputs: dict[str, Any]) -> Any:
    """The model as one that is called without arguments."""

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self) -> Any:
            return self.inner(**inputs)

    return Called()


def traced_preset(name: str, tokens: int, batch: int = 1) -> tuple[Trace, float]:
    """A preset's step with AdamW8bit, and the seconds that tracing took."""
    began = time.perf_counter()
    found = find_model(name, batch=batch, tokens=tokens)
    made = trace(found.model, found.inputs, loss_fn=found.loss_fn, optimizer="adamw8bit")
    return made, time.perf_counter() - began


def timing(console: Console, quick: bool) -> None:
    """How long planning takes for models with 32 and with 80 layers."""
    table = Table("model", "budget", "status", "trace", "plan", "CPU", "gap", title="Planning time, seconds")
    cases = [("llama-3-8b", 32768, "80GiB"), ("llama-3-8b", 8192, "60GiB")]
    if not quick:
        cases += [("llama-3-70b", 8192, "420GiB"), ("llama-3-70b", 8192, "470GiB")]
    for name, tokens, budget in cases:
        made, tracing = traced_preset(name, tokens)
        began, cpu = time.perf_counter(), time.process_time()
        found = plan(made, budget, "h100")
        spent = time.perf_counter() - began
        row = (f"{tracing:.1f}", f"{spent:.1f}", f"{time.process_time() - cpu:.1f}", f"{found.gap:.2%}")
        table.add_row(f"{name} at {tokens}", budget, found.status.value, *row)
    console.print(table)


def sweep(console: Console, quick: bool) -> None:
    """Twenty budgets from the smallest that fits to the plain peak: is any exceeded, is a tighter one ever faster?"""
    name, tokens = ("gpt2", 1024) if quick else ("llama-3.2-1b", 4096)
    made, _ = traced_preset(name, tokens, batch=4)
    weights = sum(s.bytes for s in made.storages if s.category.value == "weights")
    smallest = plan(made, weights, "rtx-4090")
    floor = smallest.smallest_budget_bytes or smallest.peak_bytes
    table = Table("budget", "peak", "of it", "step ms", "recompute", "stall", title=f"{name}: 20 budgets on rtx-4090")
    exceeded = 0
    for n in range(20):
        budget = floor + (made.peak_bytes - floor) * n // 19
        found = plan(made, budget, "rtx-4090", time_limit=5)
        exceeded += found.peak_bytes > budget
        parts = (found.step_seconds, found.recompute_seconds, found.stall_seconds)
        table.add_row(
            format_bytes(budget),
            format_bytes(found.peak_bytes),
            f"{found.peak_bytes / budget:.1%}",
            *(f"{1e3 * part:.2f}" for part in parts),
        )
    console.print(table)
    console.print(f"budgets exceeded: {exceeded} of 20")


def methods(console: Console, quick: bool) -> None:
    """Each other method at its own peak, and ours under that peak as a budget."""
    presets = (
        [("gpt2", 1024, 8, "rtx-4090")]
        if quick
        else [
            ("gpt2", 1024, 8, "rtx-4090"),
            ("qwen-2.5-0.5b", 4096, 2, "rtx-4090"),
            ("llama-3.2-1b", 8192, 1, "a100-80"),
            ("llama-3-8b", 8192, 1, "h100"),
        ]
    )
    table = Table("model", "method", "peak", "its step ms", "our step ms", "ours / its", title="At equal budget")
    for name, tokens, batch, hardware in presets:
        made, _ = traced_preset(name, tokens, batch)
        for method in BASELINES:
            _, theirs = baseline(method, made, int(made.peak_bytes * 0.7), hardware)
            ours: Plan = plan(made, theirs.peak_bytes, hardware)
            if ours.status is Status.INFEASIBLE:
                cells = ("infeasible", "-")
            else:
                cells = (f"{1e3 * ours.step_seconds:.2f}", f"{ours.step_seconds / theirs.step_seconds:.3f}")
            peak, seconds = format_bytes(theirs.peak_bytes), f"{1e3 * theirs.step_seconds:.2f}"
            table.add_row(f"{name} at {tokens}", method, peak, seconds, *cells)
    console.print(table)


PARTS = {"metered": metered, "time": timing, "sweep": sweep, "methods": methods}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller models")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    options = parser.parse_args()
    console = Console(width=120)
    console.print(f"{date.today()}, {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in options.part or PARTS:
        PARTS[name](console, options.quick)


if __name__ == "__main__":
    main()
