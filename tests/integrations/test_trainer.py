"""transformers' Trainer and accelerate with memopt: half the memory on real text, equal losses, a bitwise resume."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memopt
from examples.gpt import read_text
from memopt.integrations import equip
from memopt.integrations.hf_trainer import MemoptCallback
from memopt.optim import AdamW8bit, Lion
from memopt.wrapping import DoesNotFitError
from tests.closeness import InDouble, check_as_exact, check_losses_as_exact
from tests.integrations import real_text
from tests.integrations.causal_models import transformers

T, STEPS, SAVED = 128, 10, 5
TEXT = read_text(None, limit_bytes=2**17)
ROWS = [{"input_ids": row, "labels": row} for row in TEXT[: len(TEXT) // T * T].view(-1, T).long()]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks the old name


def llama(layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(vocab_size=256, max_position_embeddings=T, **sizes)
    return transformers.LlamaForCausalLM(config)


def made(folder: Path, model: nn.Module, callbacks: Any = None, optimizers: Any = (None, None), **options: Any) -> Any:
    usual = {"per_device_train_batch_size": 8, "max_steps": STEPS, "learning_rate": 3e-3, "logging_steps": 1}
    usual |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant"}
    arguments = transformers.TrainingArguments(str(folder), **{**usual, "save_strategy": "no", **options})
    return transformers.Trainer(model, arguments, train_dataset=ROWS, callbacks=callbacks, optimizers=optimizers)


def losses(trainer: Any, **options: Any) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):  # the Trainer prints its log
        trainer.train(**options)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], int]:
    """The Trainer by itself: its losses and its metered peak."""
    callback = MemoptCallback(fuse_loss=False, meter=True, report=False)
    found = losses(made(tmp_path_factory.mktemp("plain"), llama(), [callback]))
    assert callback.metered is not None
    return found, callback.metered.peak_bytes


def test_half_the_memory_the_same_losses_and_a_bitwise_resume(plain: tuple[list[float], int], tmp_path: Path) -> None:
    expected, peak_bytes = plain
    budget = peak_bytes // 2

    def run(**options: Any) -> tuple[nn.Module, MemoptCallback, list[float], Any]:
        model = llama()
        trainer = made(tmp_path, model, save_strategy="steps", save_steps=SAVED)
        callback = equip(trainer, optimizer="adamw8bit", budget=budget, hardware="cpu", meter=True)
        callback.console.file = io.StringIO()
        return model, callback, losses(trainer, **options), trainer

    model, callback, found, trainer = run()
    assert isinstance(trainer.optimizer.optimizer, AdamW8bit)
    assert found == pytest.approx(expected, rel=real_text.WITHIN)
    assert found[-1] < 0.8 * found[0]
    assert callback.plan is not None
    assert callback.metered is not None
    assert callback.metered.peak_bytes <= budget
    off_bytes = abs(callback.plan.peak_bytes - callback.metered.peak_bytes)
    assert off_bytes <= callback.metered.peak_bytes // 100  # as docs/offload.md promises
    assert not any("forward" in vars(layer) for layer in model.model.layers)  # the plan is off again
    report = callback.console.file.getvalue()
    assert "FITS" in report
    assert "measured" in report

    resumed, _, again, _ = run(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    assert again == found
    for (name, a), b in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_an_optimizer_object_with_gradient_accumulation_and_a_plan(tmp_path: Path) -> None:
    def run(accumulated: int, budget: int | None) -> tuple[list[float], MemoptCallback]:
        model = llama(2)
        optimizer = AdamW8bit(model.parameters(), lr=3e-3)
        options = {"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated}
        trainer = made(tmp_path, model, None, (optimizer, None), max_steps=4, **options)
        callback = equip(trainer, budget=budget, fuse_loss=budget is not None, meter=True, report=False, hardware="cpu")
        return losses(trainer), callback

    expected, free = run(1, None)
    budget = free.metered.peak_bytes * 35 // 100  # half of the batch, and two thirds of what that would take
    by_itself, _ = run(2, None)  # what another order of sums makes of the whole batch's losses
    found, planned = run(2, budget)
    check_losses_as_exact(found, by_itself, expected)
    assert planned.metered.peak_bytes <= budget


KINDS = ("fused", "plain", "exact")  # ours, the Trainer by itself, and that in float64


def of_kind(kind: str, model: nn.Module) -> nn.Module:
    return model.double() if kind == "exact" else model


def precision(kind: str) -> Any:
    return InDouble() if kind == "exact" else contextlib.nullcontext()


def test_evaluation_sees_the_logits(tmp_path: Path) -> None:
    def run(kind: str) -> dict[str, float]:
        trainer = made(tmp_path, of_kind(kind, llama(2)))
        trainer.compute_metrics = lambda seen: {
            "right": float((seen.predictions[:, :-1] == seen.label_ids[:, 1:]).mean())
        }
        trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
        if kind == "fused":
            equip(trainer)
        with contextlib.redirect_stdout(io.StringIO()), precision(kind):
            return trainer.evaluate(ROWS[:32])

    found, plain, exact = map(run, KINDS)
    check_losses_as_exact(*([one["eval_loss"]] for one in (found, plain, exact)))
    assert found["eval_right"] == plain["eval_right"]


UNEVEN = [{"input_ids": row["input_ids"], "labels": row["labels"].clone()} for row in ROWS[:16]]
for number, row in enumerate(UNEVEN):
    row["labels"][: 7 * number] = -100
WAYS: dict[str, dict[str, Any]] = {
    "uneven labels, accumulated": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
    "smoothed labels, noisy embeddings": {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0},
}


def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A ``compute_loss_func`` of the user."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("way", [*WAYS, "own loss"])
def test_the_fused_loss_trains_as_the_trainer_does_by_itself(way: str, tmp_path: Path) -> None:
    def run(kind: str) -> tuple[list[float], Any]:
        options = WAYS.get(way, {"gradient_accumulation_steps": 2})
        trainer = made(tmp_path, of_kind(kind, llama(1)), max_steps=2, **options)
        trainer.train_dataset = UNEVEN
        trainer.compute_loss_func = summed if way == "own loss" else None
        if kind == "fused":
            equip(trainer)
        with contextlib.redirect_stdout(io.StringIO()), precision(kind):
            return losses(trainer), trainer.predict(UNEVEN[:3])

    (found, ours), (plain, theirs), (exact, true) = map(run, KINDS)
    check_losses_as_exact(
        *([*many, one.metrics["test_loss"]] for many, one in ((found, ours), (plain, theirs), (exact, true)))
    )
    assert type(ours.predictions) is type(theirs.predictions)
    check_as_exact(*({"logits": torch.from_numpy(one.predictions)} for one in (ours, theirs, true)))


class Interrupt(transformers.TrainerCallback):
    """The user's hand on the keyboard, in the middle of the metered step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_an_interrupted_training_can_begin_again(tmp_path: Path) -> None:
    trainer = made(tmp_path, llama(1), max_steps=3)
    callback = equip(trainer, optimizer="adamw8bit", budget="8MiB", hardware="cpu", meter=True, report=False)
    trainer.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        losses(trainer)
    trainer.remove_callback(Interrupt)
    losses(trainer)
    assert callback.metered is not None
    assert not any("forward" in vars(layer) for layer in trainer.model.model.layers)


def test_adapters_with_a_plan(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trained = []
    for budget in (None, "8MiB"):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        trainer = made(tmp_path, peft.get_peft_model(llama(), config), max_steps=3)
        if budget is not None:
            callback = equip(trainer, optimizer="adamw8bit", budget=budget, hardware="cpu", report=False)
        trained.append(losses(trainer))
    assert callback.plan is not None
    assert callback.plan.peak_bytes < 0.6 * callback.plan.baseline_peak_bytes
    assert trained[0] == pytest.approx(trained[1], rel=real_text.WITHIN)


def test_a_plain_loop_with_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")

    reset = accelerate.state.AcceleratorState._reset_state  # the Trainers of this process have set it to no autocast

    def run(fused: bool, precision: str = "bf16") -> list[float]:
        reset(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        model = llama(2)
        optimizer = AdamW8bit(model.parameters(), lr=3e-3)
        loader = torch.utils.data.DataLoader(ROWS, batch_size=4)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        if fused:
            memopt.fuse_loss(model)
        seen = []
        for _, batch in zip(range(8), loader, strict=False):
            with accelerator.accumulate(model):
                output = model(**batch)
                assert output.logits.dtype == torch.float32  # accelerate casts what the model returns
                accelerator.backward(output.loss)
                optimizer.step()
                optimizer.zero_grad()
            seen.append(output.loss.item())
        return seen

    try:
        # Against bfloat16 the run in float32 is the truth. Every token's loss has roundings of logits of its own.
        rounding = torch.finfo(torch.bfloat16).eps / (4 * (T - 1)) ** 0.5
        check_losses_as_exact(run(True), run(False), run(False, "no"), rounding)
    finally:
        reset(reset_partial_state=True)


def test_what_cannot_be_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = llama(1)
    trainer = made(tmp_path, model, None, (Lion(model.parameters()), None))
    with pytest.raises(ValueError, match="the Trainer has a Lion already"):
        equip(trainer, optimizer="adamw8bit")
    with pytest.raises(ValueError, match="for an optimizer, but none is named"):
        equip(trainer, betas=(0.9, 0.99))
    with pytest.raises(TypeError, match=r"must be a transformers\.Trainer, not str"):
        equip("trainer")
    trainer.optimizer = None
    with pytest.raises(ValueError, match="unknown optimizer 'adamw9bit'; did you mean adamw8bit"):
        equip(trainer, optimizer="adamw9bit")
    assert "forward" not in vars(model.lm_head)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="this process sees 2 GPUs, so the Trainer would use DataParallel"):
        equip(trainer)
    trainer.args._n_gpu = 1
    trainer.args.torch_compile = True
    with pytest.raises(ValueError, match="a plan for eager mode, but the TrainingArguments have torch_compile=True"):
        equip(trainer, budget="2MiB")
    trainer.args.torch_compile = False
    assert "forward" not in vars(model.lm_head)
    equip(trainer, optimizer="lion4bit", budget="2MiB", hardware="cpu", report=False)
    with pytest.raises(ValueError, match="the Trainer is equipped already"):
        equip(trainer)
    with pytest.raises(DoesNotFitError, match="the smallest budget that does is"):
        losses(trainer)
