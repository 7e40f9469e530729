"""The planner's figures: predicted against metered peaks, planning time, budget sweep, other methods at equal budget.

python -m benchmarks.planner [--quick] [--save] [--part metered|time|sweep|methods]
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from datetime import date
from itertools import pairwise
from typing import Any

from benchmarks import predictions
from benchmarks.results import save, show
from memopt.planner import Plan, Status, Trace, find_model, format_bytes, plan, trace
from memopt.planner.baselines import BASELINES, baseline

Rows = list[dict[str, Any]]


def cpu_seconds() -> float:
    """Of this process and of the solvers that it has run."""
    return sum(os.times()[:4])


def traced_preset(name: str, tokens: int, batch: int = 1) -> tuple[Trace, float]:
    """A preset's step with AdamW8bit, and the seconds that tracing took."""
    began = time.perf_counter()
    found = find_model(name, batch=batch, tokens=tokens)
    made = trace(found.model, found.inputs, loss_fn=found.loss_fn, optimizer="adamw8bit", device="cuda")
    return replace(made, model=name), time.perf_counter() - began


def timing(quick: bool) -> tuple[Rows, str]:
    """How long tracing and planning take for models with 32 and with 80 layers."""
    cases = [("llama-3-8b", 32768, "80GiB", "h100"), ("llama-3-8b", 8192, "60GiB", "h100")]
    if not quick:
        cases += [("llama-3-70b", 8192, "420GiB", "h100"), ("llama-3-70b", 8192, "470GiB", "h100")]
    rows: Rows = []
    for name, tokens, budget, hardware in cases:
        began = cpu_seconds()
        made, tracing = traced_preset(name, tokens)
        middle, wall = cpu_seconds(), time.perf_counter()
        found = plan(made, budget, hardware)
        rows.append(
            {
                "model": f"{name} at {tokens}",
                "layers": len(made.blocks),
                "budget": budget,
                "status": found.status.value,
                "peak": format_bytes(found.peak_bytes),
                "trace s": round(tracing, 1),
                "plan s": round(time.perf_counter() - wall, 1),
                "CPU s": f"{middle - began:.1f} + {cpu_seconds() - middle:.1f}",
                "gap": f"{found.gap:.2%}",
            }
        )
    return rows, "seconds; CPU: trace + plan, solver included"


def sweep(quick: bool) -> tuple[Rows, str]:
    """Twenty budgets from the smallest that fits to the plain peak: is any exceeded, is a tighter one ever faster?"""
    name, tokens = ("gpt2", 1024) if quick else ("llama-3.2-1b", 4096)
    made, _ = traced_preset(name, tokens, batch=4)
    weights = sum(s.bytes for s in made.storages if s.category.value == "weights")
    smallest = plan(made, weights, "rtx-4090")
    floor = smallest.smallest_budget_bytes or smallest.peak_bytes
    rows: Rows = []
    seconds = []
    exceeded = 0
    for n in range(20):
        budget = floor + (made.peak_bytes - floor) * n // 19
        found = plan(made, budget, "rtx-4090", time_limit=5)
        exceeded += found.status is Status.INFEASIBLE or found.peak_bytes > budget
        seconds.append(found.step_seconds)
        rows.append(
            {
                "budget": format_bytes(budget),
                "peak": format_bytes(found.peak_bytes),
                "of it": f"{found.peak_bytes / budget:.1%}",
                "step ms": round(1e3 * found.step_seconds, 2),
                "recompute ms": round(1e3 * found.recompute_seconds, 2),
                "stall ms": round(1e3 * found.stall_seconds, 2),
                "gap": f"{found.gap:.2%}",
            }
        )
    faster = max((looser / tighter - 1 for tighter, looser in pairwise(seconds)), default=0.0)
    note = f"budgets exceeded: {exceeded} of 20; a looser budget is slower by at most {max(0.0, faster):.2%}"
    return rows, f"{name} at {tokens}, batch 4, rtx-4090; {note}"


def methods(quick: bool) -> tuple[Rows, str]:
    """Each other method at its own peak, and ours under that peak as a budget."""
    presets = [("gpt2", 1024, 8, "rtx-4090")]
    if not quick:
        presets += [
            ("qwen-2.5-0.5b", 4096, 2, "rtx-4090"),
            ("llama-3.2-1b", 8192, 1, "a100-80"),
            ("llama-3-8b", 8192, 1, "h100"),
        ]
    rows: Rows = []
    for name, tokens, batch, hardware in presets:
        made, _ = traced_preset(name, tokens, batch)
        for method in BASELINES:
            _, theirs = baseline(method, made, int(made.peak_bytes * 0.7), hardware)
            ours: Plan = plan(made, theirs.peak_bytes, hardware)
            fits = ours.status is not Status.INFEASIBLE
            rows.append(
                {
                    "model": f"{name} at {tokens}",
                    "method": method,
                    "peak": format_bytes(theirs.peak_bytes),
                    "its step ms": round(1e3 * theirs.step_seconds, 2),
                    "our step ms": round(1e3 * ours.step_seconds, 2) if fits else "infeasible",
                    "ours / its": round(ours.step_seconds / theirs.step_seconds, 4) if fits else None,
                }
            )
    return rows, "each method at its own peak, ours with that peak as the budget"


def metered(quick: bool) -> tuple[Rows, str]:
    """Predicted against metered peaks."""
    return predictions.collect(quick), "second of two steps, CPU"


PARTS = {"metered": metered, "time": timing, "sweep": sweep, "methods": methods}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller models")
    parser.add_argument("--save", action="store_true", help="keep the figures under benchmarks/results")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    options = parser.parse_args()
    print(date.today())
    for name in options.part or PARTS:
        began = time.perf_counter()
        rows, note = PARTS[name](options.quick)
        seconds = time.perf_counter() - began
        title = f"planner, {name}: {note}"
        show(title, rows)
        if options.save:
            save(f"planner-{name}", title, rows, [f"python -m benchmarks.planner --part {name} ({seconds:.0f} s)"])


if __name__ == "__main__":
    main()
