"""Speed of the quantisers and of the fused step on this CPU: ``python -m benchmarks.kernels [--json FILE]``.

Variants run in turn in one process; ratios are of the least times, so that other work on the machine disturbs little.

- Quantise and dequantise 64 Mi float32 elements against ``copy_`` of the same, and bitsandbytes where it is installed.
- AdamW over 50 M parameters in 32 tensors, and over 10 M in 400, against torch's fused float32 AdamW.
- ``--portable``: the step compiled for AVX2 alone. ``--targets``: registers, spills and shared memory of every printed
  Triton kernel on four GPU targets (no GPU needed).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases.steps import ADAMW, PAIRS, SCALARS, zero_states
from memopt.kernels import codec_names, dequantize_blockwise, get_codec, quantize_blockwise, step

Variants = dict[str, Callable[[], object]]
LIMITS = {"quantise": 3.0, "dequantise": 1.2, "8bit": 0.75, "4bit": 0.70}


def interleaved(variants: Variants, rounds: int) -> dict[str, float]:
    """The least seconds of each variant, run in turn."""
    best = dict.fromkeys(variants, float("inf"))
    for number in range(rounds + 1):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            if number:  # the first warms up
                best[name] = min(best[name], time.perf_counter() - started)
    return best


def quantizers(elements: int, rounds: int) -> dict[str, float]:
    """Ratios to a copy; encoding by either rounding, decoding into memory that is there."""
    x = torch.randn(elements // 1024, 1024)
    positive, out = x.abs(), torch.empty_like(x)
    ratios: dict[str, float] = {}
    for name in codec_names():
        y = x if get_codec(name).signed else positive
        q = quantize_blockwise(y, name)
        variants: Variants = {
            "copy": lambda: out.copy_(x),
            f"quantise {name}": lambda y=y, name=name: quantize_blockwise(y, name),
            f"quantise {name}, stochastic": lambda y=y, name=name: quantize_blockwise(y, name, rounding="stochastic"),
            f"dequantise {name}": lambda q=q: dequantize_blockwise(q, out=out),
        }
        if importlib.util.find_spec("bitsandbytes") and name == "dynamic8":
            variants |= bitsandbytes(x)
        best = interleaved(variants, rounds)
        ratios |= {key: value / best["copy"] for key, value in best.items() if key != "copy"}
    return ratios


def bitsandbytes(x: torch.Tensor) -> Variants:
    """The same of bitsandbytes: its 8-bit dynamic map, block 256, and its nf4, block 64; it has no ``out`` on a CPU."""
    from bitsandbytes import functional as bnb

    codes, state = bnb.quantize_blockwise(x, blocksize=256)
    four, four_state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")
    return {
        "bitsandbytes quantise 8-bit": lambda: bnb.quantize_blockwise(x, blocksize=256),
        "bitsandbytes dequantise 8-bit": lambda: bnb.dequantize_blockwise(codes, state),
        "bitsandbytes quantise nf4": lambda: bnb.quantize_4bit(x, blocksize=64, quant_type="nf4"),
        "bitsandbytes dequantise nf4": lambda: bnb.dequantize_4bit(four, four_state),
    }


def steps(elements: int, tensors: int, rounds: int) -> dict[str, float]:
    """Ratios of our AdamW with each kind of states to torch's fused one, float32 parameters."""
    columns = min(1024, max(64, elements // tensors // 16))
    shape = (elements // tensors // columns, columns)
    params = [torch.randn(shape) * 0.02 for _ in range(tensors)]
    grads = [torch.randn(shape) * 1e-3 for _ in range(tensors)]
    copies = [p.clone().requires_grad_() for p in params]
    for copy, g in zip(copies, grads, strict=True):
        copy.grad = g
    variants: Variants = {"torch fused": torch.optim.AdamW(copies, lr=1e-3, fused=True).step}
    for name in PAIRS:
        states = zero_states(params, name)
        variants[name] = lambda states=states, name=name: step(
            ADAMW, params, grads, states, PAIRS[name], SCALARS, seed=1, step=1
        )
    best = interleaved(variants, rounds)
    print(f"torch fused: {best['torch fused'] * 1e3:.1f} ms")
    return {name: value / best["torch fused"] for name, value in best.items()}


def show(title: str, ratios: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, ratio in ratios.items():
        limit = next((f"(at most {value})" for key, value in LIMITS.items() if name.split()[0] == key), "")
        print(f"  {name:32} {ratio:6.2f} {limit}")


def show_targets() -> None:
    from memopt.kernels.gpu.targets import TARGETS, quantize_kinds, step_kinds, usages

    for target in TARGETS:
        for kinds in (step_kinds(), quantize_kinds()):
            for usage in usages(target, kinds):
                row = dataclasses.asdict(usage)
                print("{target:7} {kernel:45} {registers:4} {spilled:3} {shared_bytes:6}".format(**row), flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the full sizes")
    parser.add_argument("--only", choices=("quantizers", "steps"))
    parser.add_argument("--portable", action="store_true", help="compile for AVX2 alone")
    parser.add_argument("--targets", action="store_true", help="only what the Triton kernels use on four GPU targets")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args(arguments)
    if options.targets:
        show_targets()
        return
    if options.portable and "MEMOPT_CPU_FLAGS" not in os.environ:
        environment = {**os.environ, "MEMOPT_CPU_FLAGS": "-mavx2 -mfma -mf16c"}
        rest = [a for a in (sys.argv[1:] if arguments is None else arguments) if a != "--portable"]
        subprocess.run([sys.executable, "-m", "benchmarks.kernels", *rest], env=environment, check=True)
        return
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {"torch": torch.__version__, "threads": options.threads}
    if options.only != "steps":
        elements = int((64 << 20) * options.scale) // 1024 * 1024
        figures["quantizers"] = quantizers(elements, options.rounds)
        show(f"{elements / 2**20:.2f} Mi elements, times of a copy", figures["quantizers"])
    if options.only != "quantizers":
        for elements, tensors in ((50_000_000, 32), (10_000_000, 400)):
            count = int(elements * options.scale)
            figures[f"steps {tensors}"] = steps(count, tensors, options.rounds)
            show(f"AdamW, {count / 1e6:.1f} M in {tensors} tensors, times of torch fused", figures[f"steps {tensors}"])
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
