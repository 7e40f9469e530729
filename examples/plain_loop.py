"""A recipe for one device in the style of torchtune: build everything, resume if there is something, train, save.

Run as ``python -m examples.plain_loop``, interrupt it, and run it again: it goes on where the last checkpoint was.
What is memopt's is marked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import memopt
from examples.gpt import GPT, GPTConfig, batches, read_text
from memopt.integrations.checkpoints import Checkpoints


def main(
    folder: Annotated[Path, typer.Option(help="Checkpoints are written to and resumed from here.")] = Path("run"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps in all, those of earlier runs included.")] = 60,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 8,
    width: Annotated[int, typer.Option(min=16, help="Width of the model.")] = 128,
    budget: Annotated[str, typer.Option(help="Memory of the whole step.")] = "32MiB",
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
) -> None:
    """Train a byte-level GPT on Python's own source within a budget, with checkpoints that do not stop training."""
    torch.manual_seed(seed)
    config = GPTConfig(layers=3, width=width, heads=4, context=128)
    data = batches(read_text(None, 2**20), batch, config.context, seed)
    inputs = next(data)

    # memopt: optimizer in 8 bits, a plan for the budget, applied
    model, optimizer, plan = memopt.wrap(GPT(config), inputs=inputs, optimizer="adamw8bit", lr=1e-3, budget=budget)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    print(f"{plan.status.value}: {plan.peak_bytes / 2**20:.1f} MiB of {budget}")

    with Checkpoints(folder, keep=2) as checkpoints:  # memopt
        found = checkpoints.load(model, optimizer)  # memopt: None the first time
        start = 0
        if found is not None:
            start = found.step
            schedule.load_state_dict(found.extra["schedule"])
            for _ in range(start):
                inputs = next(data)
            print(f"resumed at step {start}")
        for step in range(start, steps):
            loss = model(*inputs)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            inputs = next(data)
            if (step + 1) % save_every == 0:
                # memopt: returns when all is copied; written while the next steps run
                checkpoints.save(step + 1, model, optimizer, extra={"schedule": schedule.state_dict()})
            if (step + 1) % 10 == 0 or step + 1 == steps:
                print(f"step {step + 1}  loss {loss.item():.4f}")


if __name__ == "__main__":
    typer.run(main)
