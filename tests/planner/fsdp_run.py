"""A small GPT under FSDP2, as the planner's tests meter it; a module of its own, for the ranks import it."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

import memopt
from tests.planner import nets

TOKENS = torch.arange(4 * 32).reshape(4, 32) % 301


@dataclass(frozen=True)
class Setting:
    """How the model is made and trained."""

    vocabulary: int = 301  # divides by neither 2 nor 3
    tied: bool = False
    frozen: int = 0
    accumulate: int = 1


def build(setting: Setting) -> tuple[nets.GPT, torch.optim.Optimizer]:
    """The model, not sharded yet, and an optimizer of what is trained."""
    torch.manual_seed(0)
    model = nets.GPT(3, 96, 4, setting.vocabulary, tied=setting.tied)
    for block in model.blocks[: setting.frozen]:
        block.requires_grad_(False)
    return model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)


def peaks(rank: int, settings: list[Setting], plans: list[Any]) -> list[int]:
    """The metered peak of a settled step for each setting."""
    found = []
    for setting, plan in zip(settings, plans, strict=True):
        model, _ = build(setting)
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        if plan is not None:
            memopt.apply(model, plan)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        for meter in (nullcontext(), memopt.meter(model, optimizer)):
            gc.collect()  # whatever waited for it would be counted
            with meter:
                for _ in range(setting.accumulate):
                    model(TOKENS, TOKENS).backward()
                optimizer.step()
                optimizer.zero_grad()
        found.append(meter.peak_bytes)
    return found
