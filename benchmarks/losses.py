"""Time, memory and accuracy of the losses beside the plain ones.

    python -m benchmarks.losses                          # all parts, below
    python -m benchmarks.losses --parts bf16-32000       # some of them
    python -m benchmarks.losses --save                   # keeps each part under benchmarks/results as it ends

Every comparison runs its variants in turn in one process, each twice, and takes ratios of the least CPU seconds, so
that other work on the machine disturbs it little. "three products alone" is the floor: what any loss over these logits
multiplies, without softmax, autograd or fresh memory. Extra memory is the peak of resident memory beyond what was there
before the call and the gradients it leaves, each variant in a process of its own. Under six minutes on two quiet cores,
each part under two.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import loss_cases as cases
from benchmarks import results
from benchmarks.loss_cases import HIDDEN, PEER, VOCABULARY
from memopt import linear_cross_entropy
from memopt.kernels.losses import dense_linear_cross_entropy

MIB = 2**20
TOKENS = 2048
LIMITS = {  # of CPU seconds over those of the plain loss
    ("bfloat16", 32000): {"memopt": 0.9, "memopt write-once": 1.4},
    ("bfloat16", 128256): {"memopt": 1.0, "memopt write-once": 1.4},
    ("float32", 32000): {"memopt": 1.1},
    ("float32", 128256): {"memopt": 1.3},
}
Row = dict[str, Any]


def row(case: str, variant: str, **figures: Any) -> Row:
    """One line of the table; columns that do not apply stay empty."""
    columns = ("CPU s", "x plain", "at most", "x compiled", "extra MiB", "loss error", "hidden error", "weight error")
    return {"case": case, "variant": variant, **dict.fromkeys(columns), **figures}


def least_cpu_seconds(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Of all threads, by variant, run in turn; a compiled variant compiles in a round that does not count.

    Twice in a turn, as a training loop repeats one loss: after another variant, large pages may come from memory that a
    virtual machine has meanwhile given back to its host, at up to 5 ms each.
    """
    for name in {PEER} & set(variants):
        variants[name]()
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(rounds):
        for name, run in variants.items():
            for _ in range(2):
                started = time.process_time()
                run()
                best[name] = min(best[name], time.process_time() - started)
    return best


def vocabulary(V: int, dtype: torch.dtype, rounds: int, timed: Sequence[str], measured: Sequence[str]) -> list[Row]:
    """CPU seconds of the ``timed`` variants against the plain one, and the memory of the ``measured``."""
    short = str(dtype).removeprefix("torch.")
    inputs = cases.vocabulary_inputs(V, dtype, TOKENS)
    cases.step(VOCABULARY["memopt"], cases.small(inputs))  # builds the kernels
    best = least_cpu_seconds(
        {name: partial(cases.step, VOCABULARY[name], inputs) for name in timed if name in VOCABULARY}, rounds
    )
    best |= least_cpu_seconds({"three products alone": cases.products_alone(inputs)}, 1)
    del inputs
    limits = LIMITS[short, V]
    rows = []
    for name, cpu in best.items():
        figures = {"CPU s": cpu, "x plain": round(cpu / best["plain"], 2), "at most": limits.get(name)}
        if PEER in best:
            figures["x compiled"] = round(cpu / best[PEER], 2)
        if name in measured:
            figures["extra MiB"] = round(cases.extra_bytes_apart("vocabulary", name, V, short, TOKENS) / MIB)
        rows.append(row(f"{TOKENS} x {HIDDEN} x {V}, {short}", name, **figures))
    return rows


def accuracy() -> list[Row]:
    """Distances to float64 in bfloat16: of the loss, and relative of the gradients."""
    h, w, y = cases.vocabulary_inputs(4000, torch.bfloat16, TOKENS)
    truth = [t.detach().double().requires_grad_() for t in (h, w)]
    exact = dense_linear_cross_entropy(*truth, y)
    exact.backward()
    chunk = 256 * 4000 * 2
    rows = []
    for name, function in {
        "plain": cases.plain_loss,
        "memopt": VOCABULARY["memopt"],
        "memopt, 256 rows of scratch": lambda h, w, y: linear_cross_entropy(h, w, y, chunk_bytes=chunk),
        "the same, added by chunk": lambda h, w, y: linear_cross_entropy(
            h, w, y, chunk_bytes=chunk, accumulate="weight"
        ),
        "memopt write-once": VOCABULARY["memopt write-once"],
    }.items():
        loss = abs(cases.step(function, (h, w, y)) - float(exact.detach()))
        errors = [float((a.grad.double() - b.grad).norm() / b.grad.norm()) for a, b in zip((h, w), truth, strict=True)]
        named = dict(zip(("loss error", "hidden error", "weight error"), (loss, *errors), strict=True))
        rows.append(row(f"{TOKENS} x {HIDDEN} x 4000, bfloat16", name, **named))
    return rows


def memory() -> list[Row]:
    """Extra memory of the default at few and at many tokens."""
    return [
        row(
            f"{tokens} x {HIDDEN} x {V}, bfloat16",
            "memopt",
            **{"extra MiB": round(cases.extra_bytes_apart("vocabulary", "memopt", V, "bfloat16", tokens) / MIB)},
        )
        for V, tokens in ((32000, 16384), (128256, 256), (128256, 4096))
    ]


def contrastive() -> list[Row]:
    inputs = cases.pair_inputs()
    for function in cases.CONTRASTIVE.values():
        cases.step(function, cases.small(inputs))
    best = least_cpu_seconds({n: partial(cases.step, f, inputs) for n, f in cases.CONTRASTIVE.items()}, 1)
    return [
        row(
            f"{cases.PAIRS} pairs x {cases.WIDTH}, float32",
            name,
            **{
                "CPU s": cpu,
                "x plain": round(cpu / best["plain"], 2),
                "at most": 1.1 if name == "memopt" else None,
                "extra MiB": round(cases.extra_bytes_apart("pairs", name, 0, "float32", 0) / MIB),
            },
        )
        for name, cpu in best.items()
    ]


BF16, F32 = torch.bfloat16, torch.float32
WHOLE = ("plain", PEER, "memopt", "memopt write-once")
PARTS: dict[str, Callable[[int], list[Row]]] = {
    "accuracy": lambda rounds: accuracy(),
    "bf16-32000": lambda rounds: vocabulary(32000, BF16, rounds, tuple(VOCABULARY), tuple(VOCABULARY)),
    "bf16-128256": lambda rounds: vocabulary(128256, BF16, max(1, rounds // 2), tuple(VOCABULARY), WHOLE[2:]),
    "fp32-32000": lambda rounds: vocabulary(32000, F32, max(1, rounds // 2), WHOLE, WHOLE[:3]),
    "fp32-128256": lambda rounds: vocabulary(128256, F32, 1, ("plain", "memopt"), ()),
    "memory": lambda rounds: memory(),
    "contrastive": lambda rounds: contrastive(),
}


def show(title: str, rows: list[Row]) -> None:
    """A table without the columns that are empty."""
    columns = [name for name in rows[0] if any(line[name] is not None for line in rows)]
    table = Table(*columns, title=title)
    for line in rows:
        table.add_row(*(results.text(line[name]) for name in columns))
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=2, help="fewer where a round is slow")
    parser.add_argument("--save", action="store_true", help="keep the tables under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(2)
    for name in options.parts:
        started = time.perf_counter()
        rows = PARTS[name](options.rounds)
        seconds = time.perf_counter() - started
        show(f"{name}: {seconds:.0f} s", rows)
        if options.save:
            notes = [
                f"`python -m benchmarks.losses --parts {name} --save`, {seconds:.0f} s: forward and backward.",
                "Errors are distances to float64, of gradients relative in norm. Compiled is cut-cross-entropy's "
                "`torch_compile`; extra memory is beyond inputs and gradients, at most 96 MiB asked (contrastive 64).",
            ]
            print(*results.save(f"losses-{name}", f"Losses without logits: {name}", rows, notes))


if __name__ == "__main__":
    main()
