"""Fine-tune a transformers model in half the memory: the Trainer as it is, and one line.

Without ``--model`` a small Llama over bytes, with random weights, learns Python's own source; with it, the weights and
the tokenizer of a local folder (or a name on the hub) are used. ``--lora`` trains adapters only.

Run as ``python -m examples.transformers_finetune --steps 30``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from examples.gpt import read_text
from memopt.integrations import equip


def model_and_tokens(name: str | None, text: Tensor, layers: int, width: int, context: int) -> tuple[nn.Module, Tensor]:
    """A causal language model, and the text as its tokens."""
    if name is None:
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
        config = LlamaConfig(vocab_size=256, num_attention_heads=4, max_position_embeddings=context, **sizes)
        return LlamaForCausalLM(config), text.long()
    tokens = AutoTokenizer.from_pretrained(name)(bytes(text.tolist()).decode(errors="replace"))["input_ids"]
    return AutoModelForCausalLM.from_pretrained(name), torch.tensor(tokens)


def with_adapters(model: nn.Module) -> Any:
    """The model with LoRA adapters on every linear layer of its blocks, and nothing else to train."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def main(
    model: Annotated[str | None, typer.Option(help="Folder or name of a causal language model.")] = None,
    text: Annotated[Path | None, typer.Option(help="Train on this file instead of Python's own source.")] = None,
    steps: Annotated[int, typer.Option(min=4, help="Training steps.")] = 30,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 8,
    context: Annotated[int, typer.Option(min=8, help="Tokens in a sequence.")] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Blocks of the small Llama.")] = 4,
    width: Annotated[int, typer.Option(min=16, help="Width of the small Llama.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    budget: Annotated[str, typer.Option(help="Memory of the whole step.")] = "32MiB",
    lora: Annotated[bool, typer.Option("--lora", help="Train adapters only.")] = False,
) -> None:
    """Fine-tune with the transformers Trainer, an 8-bit optimizer, the fused loss and a plan."""
    set_seed(0)
    network, tokens = model_and_tokens(model, read_text(text, 2**20), layers, width, context)
    rows = [{"input_ids": row, "labels": row} for row in tokens[: len(tokens) // context * context].view(-1, context)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=batch,
            max_steps=steps,
            learning_rate=lr,
            logging_steps=max(1, steps // 5),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(with_adapters(network) if lora else network, arguments, train_dataset=rows)
        equip(trainer, optimizer="adamw8bit", budget=budget, meter=True)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    Console().print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    typer.run(main)
