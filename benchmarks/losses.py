"""Time and memory of the losses beside the plain ones: ``python -m benchmarks.losses [--quick] [--json FILE]``.

Every comparison runs its variants in turn in one process and takes ratios of the least CPU seconds, so that other work
on the machine disturbs it little. Extra memory is the peak of resident memory beyond what was there before the call and
the gradients it leaves, each variant in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
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
from torch import Tensor

from memopt import contrastive_loss, linear_cross_entropy
from memopt.kernels.losses import dense_linear_cross_entropy

MIB = 2**20
TOKENS, HIDDEN = 2048, 1024
PAIRS, WIDTH = 16384, 256
Step = Callable[[], Tensor]


def plain_loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h @ w.t(), y)


def compiled_loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as peer

    return peer(h, w, y, impl="torch_compile")


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": plain_loss,
    "cut-cross-entropy torch_compile": compiled_loss,
    "memopt": lambda h, w, y: linear_cross_entropy(h, w, y),
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


def report(title: str, best: dict[str, dict[str, float]], extra: dict[str, int], limits: dict[str, str]) -> None:
    print(f"\n{title}")
    plain = best["plain"]["cpu_seconds"]
    for name, seconds in best.items():
        memory = f"{extra[name] / MIB:8.0f} MiB extra" if name in extra else " " * 18
        ratio = seconds["cpu_seconds"] / plain
        print(f"  {name:34} {seconds['cpu_seconds']:7.2f} CPU s {ratio:6.2f} x plain {memory}  {limits.get(name, '')}")


def vocabulary(V: int, dtype: torch.dtype, rounds: int, limits: dict[str, str]) -> dict[str, Any]:
    short = str(dtype).removeprefix("torch.")
    variants = dict(VARIANTS)
    try:
        import cut_cross_entropy  # noqa: F401
    except ImportError:
        variants.pop("cut-cross-entropy torch_compile")
    inputs = vocabulary_inputs(V, dtype)
    best = interleaved(variants, inputs, rounds)
    extra = {name: memory_of("vocabulary", name, V, short, TOKENS) for name in variants}
    report(f"{TOKENS} x {HIDDEN} x {V}, {short}", best, extra, limits)
    peer = best.get("cut-cross-entropy torch_compile")
    if peer:
        print(
            f"  memopt is {best['memopt']['cpu_seconds'] / peer['cpu_seconds']:.2f} x cut-cross-entropy torch_compile"
        )
    return {"V": V, "dtype": short, "seconds": best, "extra_bytes": extra}


def accuracy() -> dict[str, float]:
    """Distances to float64 in bfloat16: of the loss, and relative of the gradients."""
    h, w, y = vocabulary_inputs(4000, torch.bfloat16)
    truth = [t.detach().double().requires_grad_() for t in (h, w)]
    exact = dense_linear_cross_entropy(*truth, y)
    exact.backward()
    result = {}
    print(f"\nDistance to float64, {TOKENS} x {HIDDEN} x 4000, bfloat16: loss, gradients of hidden and weight")
    for name, function in {
        "plain": plain_loss,
        "memopt": VARIANTS["memopt"],
        "memopt, 8 chunks": lambda h, w, y: linear_cross_entropy(h, w, y, chunk_bytes=256 * 4000 * 2),
        "memopt, 8 chunks, float32 sum": lambda h, w, y: linear_cross_entropy(
            h, w, y, chunk_bytes=256 * 4000 * 2, accumulate="float32"
        ),
        "memopt write-once": VARIANTS["memopt write-once"],
    }.items():
        loss = abs(step(function, (h, w, y)) - float(exact.detach()))
        errors = [float((a.grad.double() - b.grad).norm() / b.grad.norm()) for a, b in zip((h, w), truth, strict=True)]
        print(f"  {name:34} {loss:.1e}  {errors[0]:.2e}  {errors[1]:.2e}")
        result[name] = [loss, *errors]
    return result


def pairs(rounds: int) -> dict[str, Any]:
    best = interleaved(PAIR_VARIANTS, pair_inputs(), rounds)
    extra = {name: memory_of("pairs", name, 0, "float32", 0) for name in PAIR_VARIANTS}
    title = f"Contrastive, {PAIRS} pairs x {WIDTH}, float32"
    report(title, best, extra, {"memopt": "(at most 1.1 x, under 64 MiB)"})
    return {"seconds": best, "extra_bytes": extra}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, the smaller vocabulary only")
    parser.add_argument("--rounds", type=int, default=3, help="rounds after the one that warms up")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.memory:
        kind, name, V, dtype, tokens = json.loads(options.memory)
        inputs = pair_inputs() if kind == "pairs" else vocabulary_inputs(V, getattr(torch, dtype), tokens)
        print(extra_bytes((PAIR_VARIANTS if kind == "pairs" else VARIANTS)[name], inputs))
        return
    rounds = 1 if options.quick else options.rounds
    print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, least of {rounds} rounds"
    )
    bf16, fp32 = torch.bfloat16, torch.float32
    once = {"memopt write-once": "(at most 1.4 x)"}
    figures: dict[str, Any] = {"accuracy": accuracy(), "vocabulary": []}
    jobs = [(32000, bf16, {"memopt": "(at most 0.9 x, 96 MiB)", **once}), (32000, fp32, {"memopt": "(at most 1.1 x)"})]
    if not options.quick:
        jobs.append((128256, bf16, {"memopt": "(at most 1.0 x, 96 MiB)", **once}))
        jobs.append((128256, fp32, {"memopt": "(at most 1.3 x)"}))
    for V, dtype, limits in jobs:
        figures["vocabulary"].append(vocabulary(V, dtype, rounds, limits))
    many = {tokens: memory_of("vocabulary", "memopt", 128256, "bfloat16", tokens) for tokens in (256, 1024, 4096)}
    print("\nExtra memory of memopt at 128256 entries, bfloat16, by tokens (at most 96 MiB)")
    print("  " + ", ".join(f"{tokens}: {extra / MIB:.0f} MiB" for tokens, extra in many.items()))
    figures["extra_bytes_by_tokens"] = many
    figures["pairs"] = pairs(rounds)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
