"""The longest sequence at which an 8-billion-parameter Llama trains on one GPU, by what is done with activations.

python -m benchmarks.gpu_offload [--dry-run] [--gib 78] [--layers 32] [--arena]

All parameters are trained, in bfloat16 with 4-bit AdamW states updated inside backward, batch 1, weights at random.
Compared: plain, every layer checkpointed, checkpointed with its input on the host (``save_on_cpu``), and a memopt plan.
Sequences double until a step does not fit, then the last gap is halved twice. One JSON and one Markdown file are
written. ``--dry-run`` walks the same code on the CPU, with a model of two tiny layers and lengths of 16 and 32.
``--arena`` trains with every layer checkpointed at 4096 tokens in a ``memopt.offload.Arena`` instead, and compares the
memory reserved with the arena's plan.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import memopt
from benchmarks.results import save
from memopt.offload import Arena, SwapError
from memopt.optim import make, release_gradients
from memopt.planner import plan, trace


def llama(layers: int, tiny: bool, device: str) -> nn.Module:
    """Llama 3.1 8B's shapes; built without its cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    if tiny:
        sizes = dict.fromkeys(sizes, 64) | {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **sizes, num_hidden_layers=layers, max_position_embeddings=1 << 21, use_cache=False, attn_implementation="sdpa"
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(torch.float32)


class Loss(nn.Module):
    """The model with memopt's loss that never makes all logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.head = model.model, model.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.inner(input_ids=tokens).last_hidden_state
        loss: Tensor = memopt.linear_cross_entropy(hidden, self.head.weight, tokens, shift=1)
        return loss


def wrapped(model: Loss, offload: bool) -> Callable[[], None]:
    """Checkpoints every layer; returns what takes it off again."""
    layers = list(model.inner.layers)
    for layer in layers:
        own = layer.forward

        def forward(*args: Any, own: Callable[..., Any] = own, **kwargs: Any) -> Any:
            with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext():
                return checkpoint(own, *args, use_reentrant=False, **kwargs)

        layer.forward = forward

    def off() -> None:
        for layer in layers:
            del layer.forward

    return off


def planned(model: Loss, optimizer: torch.optim.Optimizer, tokens: Tensor, budget_bytes: int) -> Callable[[], None]:
    """Applies a plan for the budget; returns what takes it off again."""
    device = tokens.device.type
    traced = trace(model, (tokens,), optimizer=optimizer, device=device)
    if device == "cpu":  # where the point is to walk through a plan that does something
        budget_bytes = traced.peak_bytes - 1
    found = plan(traced, budget_bytes, "auto" if device == "cuda" else "cpu", time_limit=60)
    if found.smallest_budget_bytes is not None:
        raise MemoryError(f"the plan needs {found.smallest_budget_bytes} bytes")
    return memopt.apply(model, found).remove


def seconds(model: Loss, tokens: Tensor, rounds: int) -> float:
    """The best of some steps; parameters are updated inside backward."""
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        model(tokens).backward()
        if tokens.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def longest(fits: Callable[[int], dict[str, Any] | None], start: int, most: int) -> dict[str, Any]:
    """The row of the longest length that fits, to a quarter of the last power of two."""
    best: dict[str, Any] = {}
    length = start
    while length <= most and (row := fits(length)) is not None:
        best, length = row, length * 2
    step = length // 4
    while best and step >= max(start, length // 8):
        row = fits(best["tokens"] + step) if best["tokens"] + step <= most else None
        best, step = row or best, step // 2
    return best


def arena_report(layers: int) -> None:
    """Prints, for each step, what the arena has planned and reserved; lasting memory is parameters and states."""
    arena = Arena()  # before anything is on the GPU
    model = Loss(llama(layers, False, "cuda"))
    release_gradients(make("adamw4bit", model.parameters(), lr=1e-5))
    wrapped(model, False)
    tokens = torch.randint(64, (1, 4096), device="cuda")
    for step in range(6):
        with arena.step():
            spent = seconds(model, tokens, 1)
        planned_gib, reserved_gib = arena.planned_bytes / 2**30, arena.reserved_bytes / 2**30
        print(f"step {step}: {spent:.2f} s, planned {planned_gib:.3f} GiB, reserved {reserved_gib:.3f} GiB", end=", ")
        print(f"so {reserved_gib - planned_gib:.3f} GiB outlive the step, {arena.misses} misses", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument(
        "--gib", type=float, default=0.0, help="budget of the plan; by default 95 %% of the GPU's memory"
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only", default="", help="methods whose name contains this")
    parser.add_argument("--arena", action="store_true", help="reserved against planned memory, in an arena")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU found; use --dry-run to walk through on the CPU", file=sys.stderr)
        return 1
    if options.arena and not options.dry_run:
        arena_report(options.layers)
        return 0
    device = "cpu" if options.dry_run else "cuda"
    total = 2**28 if options.dry_run else int(torch.cuda.get_device_properties(0).total_memory * 0.95)
    budget = int(options.gib * 2**30) or total
    model = Loss(llama(2 if options.dry_run else options.layers, options.dry_run, device))
    optimizer = make("adamw4bit", model.parameters(), lr=1e-5)
    release_gradients(optimizer)
    methods: dict[str, Callable[[Tensor], Callable[[], None]]] = {
        "plain": lambda tokens: lambda: None,
        "checkpoint": lambda tokens: wrapped(model, False),
        "checkpoint, save_on_cpu": lambda tokens: wrapped(model, True),
        "memopt plan": lambda tokens: planned(model, optimizer, tokens, budget),
    }
    rows = []
    for name, method in methods.items():
        if options.only not in name:
            continue

        def fits(length: int, name: str = name, method: Any = method) -> dict[str, Any] | None:
            off: Callable[[], None] = lambda: None  # noqa: E731
            tokens = torch.randint(64, (1, length), device=device)
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                off = method(tokens)
                spent = seconds(model, tokens, 2)
                peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
            except (torch.cuda.OutOfMemoryError, MemoryError, SwapError) as error:
                print(f"{name:26} {length:8} does not fit: {str(error)[:90]}", flush=True)
                return None
            finally:
                off()
                model.zero_grad(set_to_none=True)
                gc.collect()
            print(f"{name:26} {length:8} {spent:8.2f} s", flush=True)
            return {"method": name, "tokens": length, "tokens per second": length / spent, "peak, GiB": peak / 2**30}

        rows.append(longest(fits, *((16, 32) if options.dry_run else (4096, 1 << 21))) or {"method": name, "tokens": 0})
    for row in rows:
        print(row)
    if not options.dry_run:
        count = sum(p.numel() for p in model.parameters()) / 1e9
        title = f"Longest sequence, {count:.1f} billion parameters, budget {budget / 2**30:.0f} GiB"
        name = torch.cuda.get_device_name().lower().replace(" ", "-")
        print(*save("offload", title, rows, ["`python -m benchmarks.gpu_offload`"], device=f"gpu-{name}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
