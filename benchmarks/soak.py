"""Does anything grow? 2000 steps of random plans, and what the process holds along the way.

python -m benchmarks.soak [--steps 2000] [--save]

Every 100 steps another plan is applied: a random mixture of keep, swap (in part, too) and recompute, on the disk tier
and the host tier by turns, with dropout; one step in 50 fails in its backward. Losses must be those of a twin that runs
plain beside it. Resident memory, file handles, threads, Python objects and what the tier holds are noted after every
tenth of the steps; the exit status is 1 where, from the first tenth to the last, handles, threads or held bytes
grow at all, objects by more than 1 %, or resident memory by more than 8 MiB.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.results import save
from memopt.offload import apply
from memopt.planner.values import Action
from tests.offload.models import CASES, make_plan, mixture, parted, templates

MIB = 2**20
CHANGE_EVERY, FAIL_EVERY = 100, 50
EXACT = (Action.KEEP, Action.SWAP, Action.RECOMPUTE)


class Failure(torch.autograd.Function):
    """Passes a tensor on, and fails in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The tensor."""
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Never comes back."""
        raise ArithmeticError("on purpose")


def held(tier: Any) -> dict[str, Any]:
    """What the process holds now."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "resident, MiB": resident / MIB,
        "file handles": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "Python objects": len(gc.get_objects()),
        "held in the tier, bytes": tier.held_bytes,
    }


def run(steps: int) -> list[dict[str, Any]]:
    """The steps; one row for each tenth."""
    case = CASES["gpt"]
    torch.manual_seed(0)
    model = case.make()
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    found = templates(case, model, case.inputs(generator))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, twin)]
    rows: list[dict[str, Any]] = []
    handle: Any = None
    with tempfile.TemporaryDirectory() as folder:
        for n in range(steps):
            if n % CHANGE_EVERY == 0:
                if handle is not None:
                    handle.remove()
                tier = ("disk", "host")[n // CHANGE_EVERY % 2]
                plan = parted(make_plan(case, mixture(found, n, EXACT), tier), found, n)
                handle = apply(model, plan, swap_folder=folder)
            inputs = case.inputs(generator)
            if n % FAIL_EVERY == 7:
                hook = model.blocks[1].register_forward_hook(lambda module, args, output: Failure.apply(output))
                try:
                    model(*inputs).backward()
                except ArithmeticError:
                    hook.remove()
                    model.zero_grad()
            losses = []
            for one, optimizer in zip((model, twin), optimizers, strict=True):
                torch.manual_seed(n)
                loss = one(*inputs)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            if losses[0] != losses[1]:
                raise SystemExit(f"step {n}: the loss is {losses[0]}, plain it is {losses[1]}")
            del loss
            if (n + 1) % (steps // 10) == 0:
                rows.append({"after step": n + 1, **held(handle.tier)})
        handle.remove()
    return rows


def main() -> int:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()
    rows = run(options.steps)
    console, title = Console(), f"Held by the process over {options.steps} steps of random plans"
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    if options.save:
        console.print(*map(str, save("soak", title, rows, [f"`python -m benchmarks.soak --steps {options.steps}`"])))
    first, last = rows[0], rows[-1]
    exact = all(last[name] <= first[name] for name in ("file handles", "threads", "held in the tier, bytes"))
    objects = last["Python objects"] <= 1.01 * first["Python objects"]
    return int(not (exact and objects and last["resident, MiB"] <= first["resident, MiB"] + 8))


if __name__ == "__main__":
    sys.exit(main())
