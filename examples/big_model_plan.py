"""Plan a model that is far too big for this machine: one device, then several under ZeRO 1, 2 and 3 or FSDP2.

    python -m examples.big_model_plan --model llama-3-8b --hardware h100 --seq 4096

No weights, no data and no GPU are needed: the step is traced on tensors without data.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import memopt
from memopt.planner import Degrees, Plan, find_model, format_bytes, hardware, shard

WAYS = (
    ("one device", Degrees()),
    ("2 devices, ZeRO 1", Degrees(data=2, zero=1)),
    ("2 devices, ZeRO 2", Degrees(data=2, zero=2)),
    ("2 devices, ZeRO 3 or FSDP2", Degrees(data=2, zero=3)),
    ("8 devices, ZeRO 3 or FSDP2", Degrees(data=8, zero=3)),
)


def shown(plan: Plan) -> tuple[str, str, str]:
    """What a plan says, or what it would take."""
    if plan.smallest_budget_bytes is not None:
        return f"needs {format_bytes(plan.smallest_budget_bytes)}", "", ""
    done: dict[str, int] = {}
    for block in plan.blocks:
        for action in block.actions:
            done[action.action.value] = done.get(action.action.value, 0) + action.bytes
    actions = ", ".join(f"{name} {format_bytes(size)}" for name, size in sorted(done.items()) if size)
    return format_bytes(plan.peak_bytes), f"{plan.step_seconds:.2f} s", actions


def main(
    model: Annotated[str, typer.Option(help="A preset, a config.json, or module:callable.")] = "llama-3-8b",
    device: Annotated[str, typer.Option("--hardware", help="Of the table, or a file of `memopt probe`.")] = "h100",
    seq: Annotated[int, typer.Option(min=1, help="Tokens in a sequence.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of one device.")] = 1,
    optimizer: Annotated[str, typer.Option(help="Such as adamw8bit.")] = "adamw8bit",
) -> None:
    """Say for one and for several devices whether a step fits, how long it takes, and what becomes of activations."""
    target = hardware(device)
    found = find_model(model, batch=batch, tokens=seq, dtype="bf16")
    step = memopt.trace(found.model, found.inputs, loss_fn=found.loss_fn, optimizer=optimizer, device="cuda")
    table = Table(title=f"{found.name}, {batch} x {seq} tokens, {optimizer}, {device}", title_justify="left")
    for heading in ("", "peak", "compute", "saved activations"):
        table.add_column(heading)
    for name, degrees in WAYS:
        table.add_row(name, *shown(memopt.plan(shard(step, degrees), budget=target.memory_bytes, hardware=target)))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
