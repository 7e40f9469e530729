"""Time, memory and accuracy of the losses beside the plain ones: ``python -m benchmarks.losses [--quick] [--save]``.

Every comparison runs its variants in turn in one process and takes ratios of the least CPU seconds, so that other work
on the machine disturbs it little. Extra memory is the peak of resident memory beyond what was there before the call and
the gradients it leaves, each variant in a process of its own. About six minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import results
from memopt import contrastive_loss, linear_cross_entropy
from memopt.kernels.losses import dense_linear_cross_entropy

MIB = 2**20
TOKENS, HIDDEN = 2048, 1024
PAIRS, WIDTH = 16384, 256
PEER = "cut-cross-entropy torch_compile"
LIMITS = {  # of CPU seconds over those of the plain loss
    ("bfloat16", 32000): {"memopt": 0.9, "memopt write-once": 1.4},
    ("bfloat16", 128256): {"memopt": 1.0, "memopt write-once": 1.4},
    ("float32", 32000): {"memopt": 1.1},
    ("float32", 128256): {"memopt": 1.3},
}
Row = dict[str, Any]
Step = Callable[[], Tensor]


def plain_loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h @ w.t(), y)


def compiled_loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as peer

    return peer(h, w, y, impl="torch_compile")


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": plain_loss,
    PEER: compiled_loss,
    "memopt": lambda h, w, y: linear_cross_entropy(h, w, y),
    "memopt, added by chunk": lambda h, w, y: linear_cross_entropy(h, w, y, accumulate="weight"),
    "memopt write-once": lambda h, w, y: linear_cross_entropy(h, w, y, mode="recompute"),
}


def vocabulary_inputs(V: int, dtype: torch.dtype, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    w = torch.empty(V, HIDDEN, dtype=dtype)
    for rows in w.split(4096):
        rows.copy_(torch.randn(rows.shape, generator=generator) * 0.02)
    return h, w.requires_grad_(), torch.randint(0, V, (tokens,), generator=generator)


def pair_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(PAIRS, WIDTH, generator=generator), dim=1).requires_grad_() for _ in range(2))
    return q, k, torch.tensor(20.0).requires_grad_()


def plain_contrastive(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    z = scale * (q @ k.t())
    own = torch.arange(z.shape[0])
    return (F.cross_entropy(z, own) + F.cross_entropy(z.t(), own)) / 2


PAIR_VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": plain_contrastive,
    "memopt": lambda q, k, scale: contrastive_loss(q, k, logit_scale=scale),
}


def step(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    for tensor in inputs:
        tensor.grad = None
    loss = function(*inputs)
    loss.backward()
    return float(loss.detach())


def interleaved(variants: dict[str, Any], inputs: tuple[Tensor, ...], rounds: int) -> dict[str, dict[str, float]]:
    """Least CPU and wall seconds of each variant; the first round warms up."""
    best = {name: {"cpu_seconds": float("inf"), "wall_seconds": float("inf")} for name in variants}
    for number in range(rounds + 1):
        for name, function in variants.items():
            cpu, wall = time.process_time(), time.perf_counter()
            step(function, inputs)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if number:
                best[name]["cpu_seconds"] = min(best[name]["cpu_seconds"], cpu)
                best[name]["wall_seconds"] = min(best[name]["wall_seconds"], wall)
    return best


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def extra_bytes(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> int:
    """Peak of resident memory during a step, beyond before it and the gradients. A small step first loads libraries."""
    small = tuple(t.detach()[:64].clone() if t.dim() else t.detach().clone() for t in inputs)
    small = (*small[:2], small[2].clamp_max(63) if small[2].dtype == torch.int64 else small[2])
    step(function, tuple(t.requires_grad_(t.is_floating_point()) for t in small))
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], resident_bytes())
            time.sleep(0.002)

    before = resident_bytes()
    watcher = threading.Thread(target=watch)
    watcher.start()
    step(function, inputs)
    stop.set()
    watcher.join()
    gradients = sum(t.grad.nbytes for t in inputs if t.grad is not None)
    return peak[0] - before - gradients


def memory_of(kind: str, name: str, V: int, dtype: str, tokens: int) -> int:
    """:func:`extra_bytes` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.losses", "--memory", json.dumps([kind, name, V, dtype, tokens])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def row(case: str, variant: str, **figures: Any) -> Row:
    """One line of the table; columns that do not apply stay empty."""
    columns = ("CPU s", "x plain", "at most", "x compiled", "extra MiB", "loss error", "hidden error", "weight error")
    return {"case": case, "variant": variant, **dict.fromkeys(columns), **figures}


def vocabulary(V: int, dtype: torch.dtype, rounds: int) -> list[Row]:
    short = str(dtype).removeprefix("torch.")
    variants = dict(VARIANTS)
    if importlib.util.find_spec("cut_cross_entropy") is None:
        variants.pop(PEER)
    if dtype == torch.float32:
        variants.pop("memopt, added by chunk")  # what the default does in this dtype
    best = interleaved(variants, vocabulary_inputs(V, dtype), rounds)
    plain, peer = (best.get(name, {}).get("cpu_seconds") for name in ("plain", PEER))
    rows = []
    for name, seconds in best.items():
        cpu = seconds["cpu_seconds"]
        extra = memory_of("vocabulary", name, V, short, TOKENS) if dtype == torch.bfloat16 else None
        rows.append(
            row(
                f"{TOKENS} x {HIDDEN} x {V}, {short}",
                name,
                **{
                    "CPU s": round(cpu, 2),
                    "x plain": round(cpu / plain, 2) if plain else None,
                    "at most": LIMITS[short, V].get(name),
                    "x compiled": round(cpu / peer, 2) if peer else None,
                    "extra MiB": None if extra is None else round(extra / MIB),
                },
            )
        )
    return rows


def accuracy() -> list[Row]:
    """Distances to float64 in bfloat16: of the loss, and relative of the gradients."""
    h, w, y = vocabulary_inputs(4000, torch.bfloat16)
    truth = [t.detach().double().requires_grad_() for t in (h, w)]
    exact = dense_linear_cross_entropy(*truth, y)
    exact.backward()
    chunk = 256 * 4000 * 2
    rows = []
    for name, function in {
        "plain": plain_loss,
        "memopt": VARIANTS["memopt"],
        "memopt, 256 rows of scratch": lambda h, w, y: linear_cross_entropy(h, w, y, chunk_bytes=chunk),
        "the same, added by chunk": lambda h, w, y: linear_cross_entropy(
            h, w, y, chunk_bytes=chunk, accumulate="weight"
        ),
        "memopt write-once": VARIANTS["memopt write-once"],
    }.items():
        loss = abs(step(function, (h, w, y)) - float(exact.detach()))
        errors = [float((a.grad.double() - b.grad).norm() / b.grad.norm()) for a, b in zip((h, w), truth, strict=True)]
        named = dict(zip(("loss error", "hidden error", "weight error"), (loss, *errors), strict=True))
        rows.append(row(f"{TOKENS} x {HIDDEN} x 4000, bfloat16", name, **named))
    return rows


def memory_by_tokens() -> list[Row]:
    cases = ((32000, 16384), (128256, 256), (128256, 4096))
    return [
        row(
            f"{tokens} x {HIDDEN} x {V}, bfloat16",
            "memopt",
            **{"extra MiB": round(memory_of("vocabulary", "memopt", V, "bfloat16", tokens) / MIB)},
        )
        for V, tokens in cases
    ]


def pairs(rounds: int) -> list[Row]:
    best = interleaved(PAIR_VARIANTS, pair_inputs(), rounds)
    plain = best["plain"]["cpu_seconds"]
    return [
        row(
            f"contrastive, {PAIRS} pairs x {WIDTH}, float32",
            name,
            **{
                "CPU s": round(seconds["cpu_seconds"], 2),
                "x plain": round(seconds["cpu_seconds"] / plain, 2),
                "at most": 1.1 if name == "memopt" else None,
                "extra MiB": round(memory_of("pairs", name, 0, "float32", 0) / MIB),
            },
        )
        for name, seconds in best.items()
    ]


def show(rows: list[Row]) -> None:
    table = Table(*rows[0])
    for line in rows:
        table.add_row(*(results.text(value) for value in line.values()))
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, the smaller vocabulary in bfloat16 only")
    parser.add_argument("--rounds", type=int, default=3, help="rounds after the one that warms up, fewer where slow")
    parser.add_argument("--save", action="store_true", help="keep the table in benchmarks/results")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.memory:
        kind, name, V, dtype, tokens = json.loads(options.memory)
        inputs = pair_inputs() if kind == "pairs" else vocabulary_inputs(V, getattr(torch, dtype), tokens)
        print(extra_bytes((PAIR_VARIANTS if kind == "pairs" else VARIANTS)[name], inputs))
        return
    rounds = 1 if options.quick else options.rounds
    tables = [accuracy, lambda: vocabulary(32000, torch.bfloat16, rounds)]
    if not options.quick:
        tables += [
            lambda: vocabulary(128256, torch.bfloat16, max(1, rounds - 1)),
            lambda: vocabulary(32000, torch.float32, max(1, rounds - 1)),
            lambda: vocabulary(128256, torch.float32, max(1, rounds - 2)),
            memory_by_tokens,
            lambda: pairs(1),
        ]
    every: list[Row] = []
    for make in tables:
        every += (made := make())
        show(made)
    if options.save:
        notes = [
            f"`python -m benchmarks.losses`: forward and backward, least CPU seconds of {rounds} rounds or fewer.",
            "Errors are distances to float64, of gradients relative in norm. Compiled is cut-cross-entropy's "
            "`torch_compile`; extra memory is beyond inputs and gradients, at most 96 MiB asked (contrastive 64).",
        ]
        for path in results.save("losses", "Losses without logits", every, notes):
            print(path)


if __name__ == "__main__":
    main()
