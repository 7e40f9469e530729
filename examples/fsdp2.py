"""Several ranks in the style of torchtitan: FSDP2, a plan for one rank's share of the step, asynchronous checkpoints.

    torchrun --nproc-per-node 2 -m examples.fsdp2

It takes GPUs where there are some and gloo ranks on the CPU otherwise. What is memopt's is marked.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch import nn
from torch.distributed.fsdp import fully_shard

import memopt
from examples.gpt import GPT, GPTConfig, batches, read_text
from memopt.integrations.checkpoints import Checkpoints
from memopt.optim import AdamW8bit
from memopt.planner import Degrees, shard


def sharded(model: GPT, inputs: tuple[torch.Tensor, torch.Tensor], budget: str) -> nn.Module:
    """The model under FSDP2, with a plan for what one rank may hold."""
    # memopt: trace the whole model, divide it among the ranks, plan
    trace = memopt.trace(model, inputs, optimizer="adamw8bit", device=inputs[0].device.type)
    one_rank = shard(trace, Degrees(data=dist.get_world_size(), zero=3))
    plan = memopt.plan(one_rank, budget=budget, hardware="auto")
    if plan.status == "infeasible":
        raise SystemExit(f"nothing fits into {budget}: {plan.binding}")

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    memopt.apply(model, plan)  # memopt: after sharding
    return model


def main(
    folder: Annotated[Path, typer.Option(help="Checkpoints are written to and resumed from here.")] = Path("run-fsdp2"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps in all, those of earlier runs included.")] = 40,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of one rank.")] = 4,
    width: Annotated[int, typer.Option(min=16, help="Width of the model.")] = 128,
    budget: Annotated[str, typer.Option(help="Memory of one rank's step.")] = "24MiB",
) -> None:
    """Train a byte-level GPT on Python's own source on every rank that torchrun starts."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)  # the same weights on every rank
    config = GPTConfig(layers=3, width=width, heads=4, context=128)
    data = batches(read_text(None, 2**20), batch, config.context, seed=rank)

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        tokens, targets = next(data)
        return tokens.to(device), targets.to(device)

    inputs = next_batch()
    model = sharded(GPT(config).to(device), inputs, budget)
    optimizer = AdamW8bit(model.parameters(), lr=1e-3)  # memopt: each rank keeps the states of its rows

    with Checkpoints(folder) as checkpoints:  # memopt: ranks write their rows of one safetensors file
        found = checkpoints.load(model, optimizer)
        start = found.step if found is not None else 0
        for _ in range(start):
            inputs = next_batch()
        for step in range(start, steps):
            loss = model(*inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            inputs = next_batch()
            if (step + 1) % save_every == 0:
                checkpoints.save(step + 1, model, optimizer)
            if rank == 0 and ((step + 1) % 10 == 0 or step + 1 == steps):
                print(f"step {step + 1}  loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
