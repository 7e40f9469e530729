"""Speed and memory of the optimizers against torch, bitsandbytes and torchao (quality: benchmarks.optimizer_quality).

    python -m benchmarks.optimizers                     # everything: three speed tables, costs of a step, the build
    python -m benchmarks.optimizers --part large        # some of large, small, bf16, costs, build
    python -m benchmarks.optimizers --quick             # a minute: three rounds, no peers
    python -m benchmarks.optimizers --save              # keeps each part's figures under benchmarks/results as it ends

All optimizers of a table run interleaved in one process; a ratio is the median over rounds divided by the median of
torch's fused AdamW, with the ratio of the minima beside it (steadier on a busy machine). "first" is the first step,
states allocated and written for the first time, over the median step; "less states" is the same without the time in
which the states were allocated and zeroed, most of which the operating system takes to find pages. The portable rows
are built with ``MEMOPT_CPU_FLAGS=-march=x86-64-v3`` (AVX2). Peers are measured where they are installed, with three
rounds: torchao compiles in its first step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import memopt
from benchmarks import results

MIB = 2**20
PORTABLE = "-march=x86-64-v3"
BASE = "torch AdamW fused"
PEER_SECONDS = 15.0  # after which a peer is measured no more
Params = list[torch.Tensor]


def large(dtype: torch.dtype) -> Params:
    """50.3 million parameters in 32 tensors."""
    return [torch.nn.Parameter(torch.randn(1536, 1024).to(dtype)) for _ in range(32)]


def small(dtype: torch.dtype) -> Params:
    """10 million parameters in 400 tensors from 64 to 90 thousand elements, of one and two dimensions."""
    shapes: list[tuple[int, ...]] = [(64,), (1024,), (300, 300), (256, 64), (128, 129), (40, 500), (210, 240), (9000,)]
    return [torch.nn.Parameter(torch.randn(shapes[i % 8]).to(dtype)) for i in range(400)]


def ragged(dtype: torch.dtype) -> Params:
    """Shapes that no block divides, a large one among them, and one that is not contiguous."""
    shapes = [(1500, 1337), (997, 101), (32, 16, 3, 3), (50001,), (7, 3), (1025, 255), ()]
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    return [*params, torch.nn.Parameter(torch.randn(700, 900).to(dtype).t())]


CASES = {
    "large": ("50 million fp32 parameters in 32 tensors", large, torch.float32),
    "small": ("10 million fp32 parameters in 400 tensors of mixed sizes", small, torch.float32),
    "bf16": ("50 million bf16 parameters in 32 tensors", large, torch.bfloat16),
}


def ours(name: str, **options: Any) -> Callable[[Params], torch.optim.Optimizer]:
    """A constructor by memopt's name."""

    def build(params: Params) -> torch.optim.Optimizer:
        from memopt.optim import make

        return make(name, params, **options)

    return build


def bitsandbytes_adamw(params: Params) -> torch.optim.Optimizer:
    """bitsandbytes' 8-bit AdamW."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params)


def torchao_adamw(params: Params) -> torch.optim.Optimizer:
    """torchao's 8-bit AdamW."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(params)


ROWS: dict[str, Callable[[Params], torch.optim.Optimizer]] = {
    BASE: lambda params: torch.optim.AdamW(params, fused=True),
    "AdamW fp32": ours("adamwfp32"),
    "AdamW bf16": ours("adamwbf16"),
    "AdamW 8bit": ours("adamw8bit"),
    "AdamW 4bit": ours("adamw4bit"),
    "Lion 8bit": ours("lion8bit"),
    "SGD 8bit": ours("sgd8bit", momentum=0.9),
    "AdamW 8bit, portable": ours("adamw8bit"),
    "AdamW 4bit, portable": ours("adamw4bit"),
}
PEERS = {"bitsandbytes AdamW8bit": bitsandbytes_adamw, "torchao AdamW8bit": torchao_adamw}


@contextmanager
def kernels_for(row: str) -> Iterator[None]:
    """Portable rows get the portable kernels."""
    kept = os.environ.get("MEMOPT_CPU_FLAGS")
    if row.endswith("portable"):
        os.environ["MEMOPT_CPU_FLAGS"] = PORTABLE
    try:
        yield
    finally:
        os.environ.pop("MEMOPT_CPU_FLAGS", None)
        if kept is not None:
            os.environ["MEMOPT_CPU_FLAGS"] = kept


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state."""
    found = 0
    for stored in optimizer.state.values():
        for value in stored.values():
            if isinstance(value, torch.Tensor):
                parts = [getattr(value, name) for name in getattr(value, "tensor_attrs", ())] or [value]
                found += sum(part.nbytes for part in parts)
    return found


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def first_step(optimizer: Any) -> tuple[float, float]:
    """Seconds of the first step, and of the part in which states were allocated (0 for other libraries)."""
    allocating = [0.0]
    allocate = getattr(optimizer, "complete", None)
    if allocate is not None:

        def measured(*args: Any) -> None:
            allocating[0] += timed(lambda: allocate(*args))

        optimizer.complete = measured
    seconds = timed(optimizer.step)
    if allocate is not None:
        del optimizer.complete
    return seconds, allocating[0]


def warm_up(dtype: torch.dtype) -> None:
    """Has every kernel built and loaded, which the first step of a table shall not wait for."""
    for name, build in ROWS.items():
        params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((64, 256), (3,))]
        with kernels_for(name):
            optimizer = build(params)
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()


def speed(case: str, rounds: int, peers: Sequence[str]) -> list[dict[str, Any]]:
    """Steps every optimizer ``rounds`` times, in turn."""
    _, parameters, dtype = CASES[case]
    warm_up(dtype)
    params = parameters(dtype)
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    running: dict[str, torch.optim.Optimizer] = {}
    first: dict[str, tuple[float, float]] = {}
    for name, build in {**ROWS, **{name: PEERS[name] for name in peers}}.items():
        try:
            running[name] = build(params)
        except ImportError as missing:
            warnings.warn(f"no row for {name}: {missing}", stacklevel=2)
            continue
        with kernels_for(name):
            first[name] = first_step(running[name])
            running[name].step()  # prepares what later steps repeat
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for number in range(rounds):
        for name, optimizer in running.items():
            if name not in PEERS or (number < 3 and sum(seconds[name]) < PEER_SECONDS):
                with kernels_for(name):
                    seconds[name].append(timed(optimizer.step))
    base, count = seconds[BASE], sum(p.numel() for p in params)
    return [
        {
            "optimizer": name,
            "ms/step": 1e3 * statistics.median(taken),
            "ratio of medians": statistics.median(taken) / statistics.median(base),
            "ratio of minima": min(taken) / min(base),
            "first": first[name][0] / statistics.median(taken),
            "less states": (first[name][0] - first[name][1]) / statistics.median(taken),
            "state bytes/parameter": state_bytes(running[name]) / count,
        }
        for name, taken in seconds.items()
    ]


def costs(rounds: int) -> list[dict[str, Any]]:
    """What a step costs besides arithmetic: temporaries on ragged shapes, and time for each of 1000 tiny tensors."""
    found = []
    for name, build in ROWS.items():
        with kernels_for(name):
            params = ragged(torch.float32)
            tiny = [torch.nn.Parameter(torch.zeros(8)) for _ in range(1000)]
            for p in (*params, *tiny):
                p.grad = torch.randn_like(p)
            optimizer, many = build(params), build(tiny)
            for _ in range(2):
                optimizer.step()
                many.step()
            with memopt.meter(optimizer=optimizer) as measured:
                optimizer.step()
            found.append(
                {
                    "optimizer": name,
                    "temporaries MiB": measured.by_category["temporaries"] / MIB,
                    "us/tensor": 1e3 * min(timed(many.step) for _ in range(3 * rounds)),
                }
            )
    return found


_FIRST = """
import time, torch
from memopt.optim import make
params = [torch.nn.Parameter(torch.zeros(s)) for s in ((64, 256), (8,))]
optimizer = make({name!r}, params)
for p in params:
    p.grad = torch.zeros_like(p)
began = time.perf_counter()
optimizer.step()
print(time.perf_counter() - began)
"""


def building() -> list[dict[str, Any]]:
    """Seconds that a user's very first step waits, with an empty cache of libraries and with a full one."""
    found = []
    for name in ("adamw8bit", "adamw4bit", "lion8bit", "muon8bit", "adamw8bit-dynamic"):
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "MEMOPT_CACHE": cache}
            command = [sys.executable, "-c", _FIRST.format(name=name)]
            cold, warm = (
                float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
                for _ in range(2)
            )
        found.append({"optimizer": name, "seconds, empty cache": cold, "seconds, full cache": warm})
    return found


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints one table."""
    table = Table(title=f"{title}, {torch.get_num_threads()} threads", title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for row in rows:
        table.add_row(*(results.text(value) for value in row.values()))
    Console(width=120).print(table)


def main() -> None:
    """Parses the options and prints what they ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=[*CASES, "costs", "build"], help="default: all of them")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="three rounds, no peers, no build from an empty cache")
    parser.add_argument("--save", action="store_true", help="keep the figures under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rounds = 3 if options.quick else options.rounds
    for part in options.part or [*CASES, "costs", *([] if options.quick else ["build"])]:
        if part == "costs":
            title, rows = "A step's temporaries on ragged shapes; 1000 tensors of 8 elements", costs(rounds)
        elif part == "build":
            title, rows = "The first step of a process", building()
        else:
            peers = [] if options.quick else list(PEERS) if part == "large" else ["bitsandbytes AdamW8bit"]
            title, rows = CASES[part][0], speed(part, rounds, peers)
        show(title, rows)
        if options.save:
            results.save(
                f"optimizers-{part}",
                title,
                rows,
                [f"`python -m benchmarks.optimizers --part {part} --rounds {rounds}`"],
            )


if __name__ == "__main__":
    main()
