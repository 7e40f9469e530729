"""What a rank does in DeepSpeed's end-to-end test: ZeRO 3 on real text, and the example, as torchrun would run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples import deepspeed_zero
from tests.integrations import real_text

SAVED, STEPS = 4, 8


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


def example(folder: str) -> None:
    """The example, and the example again, which goes on where it was."""
    for steps in (2, 3):
        deepspeed_zero.main(Path(folder) / "example", stage=3, steps=steps, batch=2, width=64)
