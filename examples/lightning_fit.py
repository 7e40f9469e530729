"""Lightning: memopt's optimizer from ``configure_optimizers``, a plan from a callback; the rest is Lightning's own.

Run as ``python -m examples.lightning_fit --steps 20``.
"""

from __future__ import annotations

from typing import Annotated

import lightning.pytorch as pl
import torch
import typer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.gpt import GPT, GPTConfig, read_text
from memopt.integrations.lightning import MemoptCallback
from memopt.optim import AdamW8bit


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """A text cut into rows: tokens, and the same shifted by one."""

    def __init__(self, text: Tensor, context: int) -> None:
        self.text, self.context = text, context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.text[index * self.context : (index + 1) * self.context + 1].long()
        return row[:-1], row[1:]


class Language(pl.LightningModule):
    """Any LightningModule; only the optimizer's name is new."""

    def __init__(self, config: GPTConfig, lr: float = 1e-3) -> None:
        super().__init__()
        self.model, self.lr = GPT(config), lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(*batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return AdamW8bit(self.parameters(), lr=self.lr)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 40,
    batch: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 8,
    width: Annotated[int, typer.Option(min=16, help="Width of the model.")] = 128,
    budget: Annotated[str, typer.Option(help="Memory of the whole step.")] = "40MiB",
) -> None:
    """Train a byte-level GPT on Python's own source."""
    pl.seed_everything(0, verbose=False)
    config = GPTConfig(layers=3, width=width, heads=4, context=64)
    loader = DataLoader(Rows(read_text(None, 2**18), config.context), batch_size=batch, shuffle=True, drop_last=True)
    callback = MemoptCallback(budget, meter=True)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Language(config), loader)
    peak = f", {callback.metered.peak_bytes / 2**20:.1f} MiB metered" if callback.metered else ""
    print(f"loss {trainer.callback_metrics['loss']:.3f}, {callback.plan.peak_bytes / 2**20:.1f} MiB planned{peak}")


if __name__ == "__main__":
    typer.run(main)
