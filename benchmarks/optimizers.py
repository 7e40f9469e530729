"""Speed and memory of the optimizers against torch, bitsandbytes and torchao (quality: benchmarks.optimizer_quality).

    python -m benchmarks.optimizers                          # the three speed tables
    python -m benchmarks.optimizers --cases large            # one of large, small, bf16
    python -m benchmarks.optimizers --peers --json FILE      # bitsandbytes and torchao too; figures as JSON

All optimizers of a table run interleaved in one process; a ratio is the median over rounds divided by the median of
torch's fused fp32 AdamW, with the ratio of the minima beside it (steadier on a busy machine).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import memopt

MIB = 2**20


def large(dtype: torch.dtype) -> list[torch.Tensor]:
    """50.3 million parameters in 32 tensors."""
    return [torch.nn.Parameter(torch.randn(1536, 1024).to(dtype)) for _ in range(32)]


def small(dtype: torch.dtype) -> list[torch.Tensor]:
    """10 million parameters in 400 tensors from 64 to 90 thousand elements, of one and two dimensions."""
    shapes: list[tuple[int, ...]] = [(64,), (1024,), (300, 300), (256, 64), (128, 129), (40, 500), (210, 240), (9000,)]
    return [torch.nn.Parameter(torch.randn(shapes[i % 8]).to(dtype)) for i in range(400)]


CASES = {
    "large": ("50 million fp32 parameters in 32 tensors", large, torch.float32),
    "small": ("400 tensors of mixed small sizes, fp32", small, torch.float32),
    "bf16": ("50 million bf16 parameters in 32 tensors", large, torch.bfloat16),
}


def ours(name: str, **options: Any) -> Callable[[list[torch.Tensor]], torch.optim.Optimizer]:
    """A constructor by memopt's name."""

    def build(params: list[torch.Tensor]) -> torch.optim.Optimizer:
        from memopt.optim import make

        return make(name, params, **options)

    return build


def bitsandbytes_adamw(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    """bitsandbytes' 8-bit AdamW."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params)


def torchao_adamw(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    """torchao's 8-bit AdamW; its first step compiles."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(params)


ROWS: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "torch AdamW fused": lambda params: torch.optim.AdamW(params, fused=True),
    "AdamW fp32": ours("adamwfp32"),
    "AdamW bf16": ours("adamwbf16"),
    "AdamW 8bit": ours("adamw8bit"),
    "AdamW 4bit": ours("adamw4bit"),
    "Lion 8bit": ours("lion8bit"),
    "SGD 8bit": ours("sgd8bit", momentum=0.9),
}
PEERS = {"bitsandbytes AdamW8bit": bitsandbytes_adamw, "torchao AdamW8bit": torchao_adamw}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state."""
    found = 0
    for stored in optimizer.state.values():
        for value in stored.values():
            if isinstance(value, torch.Tensor):
                parts = [getattr(value, name) for name in getattr(value, "tensor_attrs", ())] or [value]
                found += sum(part.nbytes for part in parts)
    return found


def temporary_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Most bytes of tensors that one step makes and drops."""
    with memopt.meter(optimizer=optimizer) as measured:
        optimizer.step()
    return int(measured.by_category["temporaries"])


def speed(case: str, rounds: int, peers: bool) -> dict[str, dict[str, float]]:
    """Steps every optimizer ``rounds`` times, in turn; seconds, first step, bytes."""
    _, parameters, dtype = CASES[case]
    running: dict[str, torch.optim.Optimizer] = {}
    first: dict[str, float] = {}
    params = parameters(dtype)
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    for name, build in {**ROWS, **(PEERS if peers else {})}.items():
        try:
            running[name] = build(params)
        except ImportError:
            continue
        began = time.perf_counter()
        running[name].step()
        first[name] = time.perf_counter() - began
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, optimizer in running.items():
            began = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - began)
    count = sum(p.numel() for p in params)
    base = seconds["torch AdamW fused"]
    return {
        name: {
            "median_seconds": statistics.median(taken),
            "ratio_of_medians": statistics.median(taken) / statistics.median(base),
            "ratio_of_minima": min(taken) / min(base),
            "first_step_ratio": first[name] / statistics.median(taken),
            "state_bytes_per_parameter": state_bytes(running[name]) / count,
        }
        for name, taken in seconds.items()
    }


def temporaries() -> dict[str, int]:
    """Peak temporary bytes of one step of each of our optimizers on the small case."""
    found = {}
    for name, build in ROWS.items():
        if not name.startswith("torch"):
            params = small(torch.float32)
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer = build(params)
            optimizer.step()
            found[name] = temporary_bytes(optimizer)
    return found


def print_speed(case: str, table: dict[str, dict[str, float]]) -> None:
    """One table as text."""
    print(f"\n{CASES[case][0]}, {torch.get_num_threads()} threads")
    print(f"{'':24}{'ms/step':>9}{'ratio':>8}{'min/min':>9}{'first/later':>13}{'state B/param':>15}")
    for name, row in table.items():
        print(
            f"{name:24}{row['median_seconds'] * 1e3:9.1f}{row['ratio_of_medians']:8.2f}{row['ratio_of_minima']:9.2f}"
            f"{row['first_step_ratio']:13.2f}{row['state_bytes_per_parameter']:15.3f}"
        )


def main() -> None:
    """Parses the options and prints what they ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", action="store_true", help="bitsandbytes and torchao too, where installed")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    figures: dict[str, Any] = {"torch": torch.__version__, "threads": options.threads}
    for case in options.cases:
        figures[case] = speed(case, options.rounds, options.peers)
        print_speed(case, figures[case])
    figures["temporary_bytes"] = temporaries()
    print("\npeak temporaries of a step, small case: ", end="")
    print(", ".join(f"{name} {size / MIB:.3f} MiB" for name, size in figures["temporary_bytes"].items()))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
