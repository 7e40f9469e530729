"""DeepSpeed: ZeRO 1, 2 or 3 with memopt's optimizer as the client optimizer; checkpoints through the engine.

    torchrun --nproc-per-node 2 -m examples.deepspeed_zero --stage 2

What is memopt's is marked; the rest is DeepSpeed's own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from examples.gpt import GPT, GPTConfig, batches, read_text
from memopt.optim import AdamW8bit


def engine(model: torch.nn.Module, stage: int, batch: int, lr: float) -> Any:
    """DeepSpeed's engine around the model."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": batch,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # memopt: DeepSpeed asks this for every optimizer but its own
    }
    optimizer = AdamW8bit(model.parameters(), lr=lr)  # memopt
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def main(
    folder: Annotated[Path, typer.Option(help="Checkpoints are written to and resumed from here.")] = Path("run-zero"),
    stage: Annotated[int, typer.Option(min=1, max=3, help="ZeRO stage.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Training steps in all, those of earlier runs included.")] = 40,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of one rank.")] = 4,
    width: Annotated[int, typer.Option(min=16, help="Width of the model.")] = 128,
) -> None:
    """Train a byte-level GPT on Python's own source on every rank that torchrun starts."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)  # the same weights on every rank
    config = GPTConfig(layers=3, width=width, heads=4, context=128)
    module = engine(GPT(config), stage, batch, lr=1e-3)
    data = batches(read_text(None, 2**20), batch, config.context, seed=rank)

    _, state = module.load_checkpoint(folder)
    start = state["step"] if state else 0
    for _ in range(start):
        next(data)
    for step in range(start, steps):
        inputs = next(data)
        loss = module(*(tensor.to(module.device) for tensor in inputs))
        module.backward(loss)
        module.step()
        if rank == 0 and ((step + 1) % 10 == 0 or step + 1 == steps):
            print(f"step {step + 1}  loss {loss.item():.4f}")
    module.save_checkpoint(folder, client_state={"step": steps})


if __name__ == "__main__":
    typer.run(main)
