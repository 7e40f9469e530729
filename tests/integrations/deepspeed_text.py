"""What a rank does in DeepSpeed's end-to-end tests: ZeRO 3 on real text, with and without a plan, and the example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import memopt
from examples import deepspeed_zero
from tests.integrations import real_text

SAVED, STEPS = 4, 8
PLANNED_STEPS = 3
SHARDED = {  # nothing stays gathered, so small as the model is, and DeepSpeed's own buffers are small
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 5000,
    "reduce_bucket_size": 50000,
}


def train(module: Any, rank: int, steps: range) -> list[float]:
    losses = []
    for inputs in real_text.data(steps, rank):
        loss = module(*inputs)
        module.backward(loss)
        module.step()
        losses.append(loss.item())
    return losses


def zero_3(rank: int, folder: str) -> dict[str, Any]:
    """Losses with 8-bit states; saved in the middle, loaded into a new engine, and continued."""
    module = deepspeed_zero.engine(real_text.model(), 3, real_text.PER_RANK, real_text.LR)
    losses = train(module, rank, range(SAVED))
    module.save_checkpoint(f"{folder}/text", tag="here")
    losses += train(module, rank, range(SAVED, STEPS))
    again = deepspeed_zero.engine(real_text.model(), 3, real_text.PER_RANK, real_text.LR)
    again.load_checkpoint(f"{folder}/text", tag="here")
    return {"losses": losses, "resumed": train(again, rank, range(SAVED, STEPS))}


def planned(rank: int, linear: Any) -> dict[str, dict[str, Any]]:
    """Three steps under a plan for 65 % of the step's peak, and three without: losses, parameters and metered peak.

    ``linear`` is torch's own ``nn.functional.linear``, which an engine of before has replaced for good.
    """
    import deepspeed

    nn.functional.linear = linear
    plan, _ = real_text.planned(3, 0.65)
    found: dict[str, dict[str, Any]] = {}
    for name in ("plain", "plan"):
        model = real_text.model()
        config = {
            "train_micro_batch_size_per_gpu": real_text.PER_RANK,
            "zero_optimization": {**SHARDED, "memory_efficient_linear": False},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=real_text.LR)
        module = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
        handle = memopt.apply(module.module, plan) if name == "plan" else None
        losses = train(module, rank, range(PLANNED_STEPS - 1))
        with memopt.meter((), ()) as meter:
            losses += train(module, rank, range(PLANNED_STEPS - 1, PLANNED_STEPS))
        found[name] = {"losses": losses, "activations": meter.peak_by_category["activations"]}
        if handle is not None:
            handle.remove()
            found[name] |= {"replays": handle.counts.replays, "whole": handle.counts.reasons}
        parameters = list(model.parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            found[name]["parameters"] = [parameter.detach().clone() for parameter in parameters]
    return found


def example(folder: str) -> None:
    """The example, and the example again, which goes on where it was."""
    for steps in (2, 3):
        deepspeed_zero.main(Path(folder) / "example", stage=3, steps=steps, batch=2, width=64)
