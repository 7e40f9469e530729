"""DeepSpeed: ZeRO 1, 2 or 3 with memopt's optimizer as the client optimizer, and a plan for one rank's share of a step.

    torchrun --nproc-per-node 2 -m examples.deepspeed_zero --stage 2

What is memopt's is marked; the rest is DeepSpeed's own, checkpoints through the engine included.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

import memopt
from examples.gpt import GPT, GPTConfig, batches, read_text
from memopt.optim import AdamW8bit
from memopt.planner import Degrees, Plan, parse_bytes, shard

BUCKET = 2**18  # elements that DeepSpeed reduces together; its default is sized for models of billions


def headroom_bytes(model: GPT, stage: int) -> int:
    """What DeepSpeed holds that a plan does not count: its copy of the share, and buckets."""
    share = sum(p.nbytes for p in model.parameters()) // dist.get_world_size()
    return share + (8 if stage == 3 else 4) * BUCKET


def planned(model: GPT, inputs: tuple[torch.Tensor, torch.Tensor], stage: int, budget: int | str) -> Plan:
    """A plan for what one rank may hold, made before DeepSpeed has seen the model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trace = memopt.trace(model, inputs, optimizer="adamw8bit", device=device)
    one_rank = shard(trace, Degrees(data=dist.get_world_size(), zero=stage))
    plan = memopt.plan(one_rank, budget=parse_bytes(budget) - headroom_bytes(model, stage), hardware="auto")
    if plan.status == "infeasible":
        raise SystemExit(f"nothing fits into {budget}: {plan.binding}")
    return plan


def engine(model: GPT, stage: int, batch: int, lr: float, plan: Plan | None = None) -> Any:
    """DeepSpeed's engine around the model, with the plan applied."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": batch,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET // 4,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "memory_efficient_linear": False,  # memopt: the linear layers of the plan, not DeepSpeed's
        },
        "zero_allow_untested_optimizer": True,  # memopt: DeepSpeed asks this for every optimizer but its own
    }
    optimizer = AdamW8bit(model.parameters(), lr=lr)  # memopt
    module, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    if plan is not None:
        memopt.apply(module.module, plan)  # memopt
    return module


def main(
    folder: Annotated[Path, typer.Option(help="Checkpoints are written to and resumed from here.")] = Path("run-zero"),
    stage: Annotated[int, typer.Option(min=1, max=3, help="ZeRO stage.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Training steps in all, those of earlier runs included.")] = 40,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of one rank.")] = 4,
    width: Annotated[int, typer.Option(min=16, help="Width of the model.")] = 128,
    budget: Annotated[str, typer.Option(help="Memory of one rank's step.")] = "18MiB",
) -> None:
    """Train a byte-level GPT on Python's own source on every rank that torchrun starts."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)  # the same weights on every rank
    config = GPTConfig(layers=3, width=width, heads=4, context=128)
    data = batches(read_text(None, 2**20), batch, config.context, seed=rank)
    inputs, model = next(data), GPT(config)
    plan = planned(model, inputs, stage, budget)  # memopt
    module = engine(model, stage, batch, lr=1e-3, plan=plan)

    _, state = module.load_checkpoint(folder)
    start = state["step"] if state else 0
    for _ in range(start):
        inputs = next(data)
    for step in range(start, steps):
        loss = module(*(tensor.to(module.device) for tensor in inputs))
        module.backward(loss)
        module.step()
        inputs = next(data)
        if rank == 0 and ((step + 1) % 10 == 0 or step + 1 == steps):
            print(f"step {step + 1}  loss {loss.item():.4f}")
    module.save_checkpoint(folder, client_state={"step": steps})


if __name__ == "__main__":
    typer.run(main)
