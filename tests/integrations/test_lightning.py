"""Lightning with the real library: the callback's plan, the budget, checkpoints, and the example."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import memopt
from memopt.optim import AdamW8bit
from tests.integrations import real_text

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Lightning's own
    pl = pytest.importorskip("lightning.pytorch", reason="the lightning extra is not installed")
    from examples import lightning_fit
    from memopt.integrations.lightning import MemoptCallback

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, SAVED = 8, 4
BUDGET = "3300KiB"


class Language(pl.LightningModule):
    def __init__(self, optimizer: Any = AdamW8bit) -> None:
        super().__init__()
        self.model, self.optimizer, self.losses = real_text.model(), optimizer, []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        loss = self.model(*batch)
        self.log("loss", loss)
        self.log_dict({"twice": 2 * loss})
        return {"loss": loss}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=real_text.LR)


def fitted(folder: Path, module: Any = None, callbacks: Any = (), resume: str | None = None, **options: Any) -> Any:
    module = Language() if module is None else module
    saving = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=SAVED, save_top_k=-1)
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_steps=STEPS,
        accelerator="cpu",
        callbacks=[saving, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    rows = real_text.data(range(SAVED), 0)  # an epoch: Lightning begins the data anew when it resumes within one
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=None), ckpt_path=resume)
    return module, trainer


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    yield
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)


def test_a_plan_keeps_the_step_within_the_budget_and_the_loss(tmp_path: Path) -> None:
    plain, _ = fitted(tmp_path / "plain", Language(torch.optim.AdamW))
    callback = MemoptCallback(BUDGET, hardware="cpu", meter=True)
    ours, trainer = fitted(tmp_path / "ours", callbacks=[callback])
    assert ours.losses == pytest.approx(plain.losses, rel=real_text.WITHIN)
    assert callback.plan.status in ("optimal", "feasible")
    assert callback.metered.peak_bytes <= memopt.planner.parse_bytes(BUDGET)
    assert trainer.callback_metrics["twice"] == 2 * trainer.callback_metrics["loss"]
    assert "log" not in vars(ours)
    for block in ours.model.blocks:
        assert "forward" not in vars(block)


def test_a_resumed_fit_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, _ = fitted(tmp_path / "whole", callbacks=[MemoptCallback(BUDGET, hardware="cpu")])
    checkpoint = str(tmp_path / "whole" / f"step={SAVED}.ckpt")
    rest, _ = fitted(tmp_path / "rest", callbacks=[MemoptCallback(BUDGET, hardware="cpu")], resume=checkpoint)
    for (name, got), expected in zip(rest.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, expected), name


def test_accumulated_gradients_are_those_of_lightning(tmp_path: Path) -> None:
    """Clearing gradients early leaves those that add up alone."""
    plain, _ = fitted(tmp_path / "plain", accumulate_grad_batches=2)
    ours, _ = fitted(tmp_path / "ours", callbacks=[MemoptCallback(meter=True)], accumulate_grad_batches=2)
    assert ours.losses == plain.losses


def test_what_does_not_fit_is_said_and_leaves_the_module_alone(tmp_path: Path) -> None:
    module = Language()
    with pytest.raises(ValueError, match="nothing fits; the smallest budget that does is"):
        fitted(tmp_path, module, [MemoptCallback("1MiB", hardware="cpu")])
    assert "log" not in vars(module)


def test_the_example_trains(capsys: pytest.CaptureFixture[str]) -> None:
    lightning_fit.main(steps=4, batch=4, width=64, budget="40MiB")
    assert "MiB metered" in capsys.readouterr().out
