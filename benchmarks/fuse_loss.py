"""One training step of a small transformers Llama, with its logits and without: metered peak and seconds.

Run as ``python -m benchmarks.fuse_loss``; ``--save`` keeps the figures under ``benchmarks/results``.
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import memopt
from benchmarks.results import save as keep

MIB = 2**20
VOCABULARY = 32_000


def step(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Forward and backward; seconds of this process."""
    began = time.process_time()
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad(set_to_none=True)
    return time.process_time() - began


def measure(tokens: int, dtype: torch.dtype, rounds: int) -> dict[str, tuple[int, int, float]]:
    """By way: peak in bytes, of it logits and loss, least CPU seconds; the ways take turns."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=tokens, **sizes)
    model = LlamaForCausalLM(config).to(dtype).train()
    ids = torch.randint(VOCABULARY, (1, tokens))
    seconds: dict[str, list[float]] = {"transformers": [], "fuse_loss": []}
    meters = {}
    for _ in range(rounds):
        for way, times in seconds.items():
            handle = memopt.fuse_loss(model) if way == "fuse_loss" else None
            if way not in meters:
                with memopt.meter(model, []) as meters[way]:
                    step(model, ids)
            times.append(step(model, ids))
            if handle is not None:
                handle.remove()
    return {way: (m.peak_bytes, m.peak_by_category["logits_and_loss"], min(seconds[way])) for way, m in meters.items()}


def main(
    tokens: Annotated[int, typer.Option(min=2, help="Tokens in the step.")] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each way; the fastest counts.")] = 3,
    save: Annotated[bool, typer.Option("--save", help="Keep the figures.")] = False,
) -> None:
    """Compare a model's own loss with the fused one."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for way, (peak, logits, seconds) in measure(tokens, dtype, rounds).items():
            sizes = {"peak MiB": f"{peak / MIB:.0f}", "of it logits and loss": f"{logits / MIB:.0f}"}
            rows.append({"dtype": str(dtype)[6:], "way": way, **sizes, "CPU seconds": f"{seconds:.2f}"})
    title = f"Forward and backward of a Llama: {tokens} tokens, vocabulary {VOCABULARY}"
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
    if save:
        keep("fuse_loss", title, rows, ["`python -m benchmarks.fuse_loss`"])


if __name__ == "__main__":
    typer.run(main)
