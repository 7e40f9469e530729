"""Speed of the quantisers, layers and of the fused step on this CPU: ``python -m benchmarks.kernels [--save]``.

Variants run in turn in one process; ratios are of the least times, so that other work on the machine disturbs little.

- Quantise and dequantise 64 Mi elements with every codec against ``copy_`` of the same tensor into memory that is there
  already, as all of them do; then the same into fresh memory, against ``clone``; bitsandbytes where it is installed.
- AdamW over 50 M parameters in 32 tensors, and over 10 M in 400, against torch's fused float32 AdamW.
- Layers, forward and backward, against torch's own.
- Each part is shown, and kept with ``--save``, as it ends: under two minutes a part, under six all, on two quiet cores.
- ``--portable``: compiled for AVX2 alone. ``--targets``: registers, spills and shared memory of every Triton kernel on
  four GPU targets, compiled without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import results
from benchmarks.gpu_cases.steps import ADAMW, PAIRS, SCALARS, zero_states
from memopt.kernels import codec_names, dequantize_blockwise, get_codec, quantize_blockwise, step

Variants = dict[str, Callable[[], object]]
Row = dict[str, Any]
LIMITS = {"quantise": 3.0, "dequantise": 1.2}


def interleaved(variants: Variants, rounds: int) -> dict[str, tuple[float, float]]:
    """The least seconds of each variant on the wall and of all threads' processors, run in turn."""
    best = dict.fromkeys(variants, (float("inf"), float("inf")))
    for number in range(rounds + 1):
        for name, run in variants.items():
            started = time.perf_counter(), time.process_time()
            run()
            wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
            if number:  # the first warms up
                best[name] = min(best[name][0], wall), min(best[name][1], cpu)
    return best


def against_first(group: str, variants: Variants, rounds: int, limits: Mapping[str, float] = {}) -> list[Row]:
    """One row for each variant; ratios are to the first. That of CPU seconds suffers less from other work."""
    best = interleaved(variants, rounds)
    base_wall, base_cpu = next(iter(best.values()))
    return [
        {
            "group": group,
            "what": name,
            "ms": 1e3 * wall,
            "ratio": wall / base_wall,
            "CPU ratio": cpu / base_cpu,
            "at most": limits.get(name.split()[0]),
        }
        for name, (wall, cpu) in best.items()
    ]


def quantizers(elements: int, rounds: int, dtype: torch.dtype, names: Sequence[str]) -> list[Row]:
    """Each codec in turn, into memory that is there, with a copy of the same dtype beside it."""
    x = torch.randn(elements // 1024, 1024).to(dtype)
    positive, to = x.abs(), torch.empty_like(x)
    rows: list[Row] = []
    for name in names:
        y = x if get_codec(name).signed else positive
        q, held = quantize_blockwise(y, name), quantize_blockwise(y, name)
        encode = functools.partial(quantize_blockwise, y, name, out=held)
        variants: Variants = {
            "copy_": functools.partial(to.copy_, x),
            f"quantise {name}": encode,
            f"quantise {name}, stochastic": functools.partial(encode, rounding="stochastic"),
            f"dequantise {name}": functools.partial(dequantize_blockwise, q, out=to),
        }
        rows += against_first(
            f"{str(dtype)[6:]}, memory given", variants, rounds, LIMITS if dtype == torch.float32 else {}
        )
    return rows


def fresh_quantizers(elements: int, rounds: int) -> list[Row]:
    """Into fresh memory, which a first touch makes expensive: the ratios are to ``clone``."""
    x = torch.randn(elements // 1024, 1024)
    variants: Variants = {"clone": x.clone}
    for name in ("sq127", "sq15", "dynamic8", "nf4"):
        q = quantize_blockwise(x, name)
        variants[f"quantise {name}"] = functools.partial(quantize_blockwise, x, name)
        variants[f"dequantise {name}"] = functools.partial(dequantize_blockwise, q)
    if importlib.util.find_spec("bitsandbytes"):
        variants |= bitsandbytes(x)
    return against_first("float32, fresh memory", variants, rounds)


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


def steps(elements: int, tensors: int, rounds: int) -> list[Row]:
    """Our AdamW with each kind of states against torch's fused one, float32 parameters."""
    columns = min(1024, max(64, elements // tensors // 16))
    shape = (elements // tensors // columns, columns)
    params = [torch.randn(shape) * 0.02 for _ in range(tensors)]
    grads = [torch.randn(shape) * 1e-3 for _ in range(tensors)]
    copies = [p.clone().requires_grad_() for p in params]
    for copy, g in zip(copies, grads, strict=True):
        copy.grad = g
    variants: Variants = {"torch fused": torch.optim.AdamW(copies, lr=1e-3, fused=True).step}
    for name in PAIRS:
        arguments = (ADAMW, params, grads, zero_states(params, name), PAIRS[name], SCALARS)
        variants[name] = functools.partial(step, *arguments, seed=1, step=1)
    return against_first(f"AdamW, {elements / 1e6:.0f} M in {tensors}", variants, rounds)


def of_dtype(dtype: torch.dtype, options: argparse.Namespace) -> list[Row]:
    return quantizers(_scaled(64 << 20, options) // 1024 * 1024, options.rounds, dtype, options.codecs)


def every_layer(options: argparse.Namespace) -> list[Row]:
    from benchmarks.layer_cases import layers

    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, variants in layers(_scaled(8192, options), 1024, dtype).items():
            rows += against_first(f"{name} {str(dtype)[6:]}", variants, options.rounds)
    return rows


def every_step(options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for elements, tensors in ((50_000_000, 32), (10_000_000, 400)):
        rows += steps(_scaled(elements, options), tensors, options.rounds)
    return rows


def _scaled(number: int, options: argparse.Namespace) -> int:
    return int(number * options.scale)


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "fp32": functools.partial(of_dtype, torch.float32),
    "bf16": functools.partial(of_dtype, torch.bfloat16),
    "fp16": functools.partial(of_dtype, torch.float16),
    "fresh": lambda options: fresh_quantizers(_scaled(16 << 20, options) // 1024 * 1024, max(2, options.rounds // 2)),
    "layers": every_layer,
    "steps": every_step,
}


def show(rows: list[Row], title: str) -> None:
    """A table on the terminal; ratios above their limit are red."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        over = row.get("at most") is not None and row["ratio"] > row["at most"]
        table.add_row(*map(results.text, row.values()), style="red" if over else "")
    Console(width=120).print(table)


def show_targets(everything: bool, save: bool) -> int:
    """The table of resources; the exit status tells whether a kernel spills."""
    from benchmarks.gpu_targets import measure

    started = time.perf_counter()
    rows = measure(everything)
    seconds = time.perf_counter() - started
    show(rows, f"Triton kernels on four targets: {len(rows)} compilations, {seconds:.0f} s from a cold cache")
    if save:
        notes = [f"`python -m benchmarks.kernels --targets --save`: {seconds:.0f} s from a cold cache."]
        print(*results.save("targets", "What Triton kernels use", rows, notes))
    spilling = [f"{row['kernel']} on {row['target']}" for row in rows if row["spilled"]]
    print("no kernel spills" if not spilling else "SPILLS: " + "; ".join(spilling))
    return int(bool(spilling))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the full sizes")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--codecs", nargs="+", choices=codec_names(), default=codec_names(), help="of the quantisers")
    parser.add_argument("--portable", action="store_true", help="compile for AVX2 alone")
    parser.add_argument("--targets", action="store_true", help="only what the Triton kernels use on four GPU targets")
    parser.add_argument("--all", action="store_true", help="with --targets: every rule in every format")
    parser.add_argument("--save", action="store_true", help="keep the figures under benchmarks/results/")
    options = parser.parse_args(arguments)
    if options.targets:
        return show_targets(options.all, options.save)
    if options.portable and "MEMOPT_CPU_FLAGS" not in os.environ:
        environment = {**os.environ, "MEMOPT_CPU_FLAGS": "-mavx2 -mfma -mf16c"}
        rest = [a for a in (sys.argv[1:] if arguments is None else arguments) if a != "--portable"]
        return subprocess.run([sys.executable, "-m", "benchmarks.kernels", *rest], env=environment).returncode
    torch.set_num_threads(options.threads)
    for name in options.parts:
        started = time.perf_counter()
        rows = PARTS[name](options)
        seconds = time.perf_counter() - started
        show(rows, f"{name}, {options.threads} threads: {seconds:.0f} s")
        if options.save:
            command = f"`python -m benchmarks.kernels --parts {name} --save`, {seconds:.0f} s"
            notes = [f"{command}; the ratio is to the first of each group."]
            print(*results.save(f"kernels-{name}", f"Kernels on a CPU: {name}", rows, notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
