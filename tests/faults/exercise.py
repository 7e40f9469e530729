"""Calls the native code on odd sizes and from many threads; run by the tests under a sanitizer's runtime.

``python -m tests.faults.exercise all`` takes every rule, format and codec, ``few`` a few of them; words behind it
choose parts: ``all layers arena``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence

import torch

from memopt import linear_cross_entropy
from memopt.kernels import (
    codec_names,
    contrastive_loss,
    dequantize_blockwise,
    geglu,
    get_codec,
    layer_norm,
    pack_mask,
    packed_relu,
    quantize_blockwise,
    rms_norm,
    rotary_,
    seeded_dropout,
    swiglu,
    unpack_mask,
)
from memopt.optim import make
from memopt.optim.registry import rules_by_name
from memopt.planner import Buffer, place
from tests.offload import test_arena, test_arena_sharing

SHAPES = ((3, 257), (7,), (), (0,), (5, 128), (1, 1023), (2, 3, 5))
FEW = (("adamw", "8bit"), ("adamw", "4bit"))
NEEDED = {"sgd": {"momentum": 0.9}}
FORMATS = ("fp32", "bf16", "8bit", "8bit-dynamic", "4bit", "4bit-paper")


def quantisers(names: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    for name in names:
        for dtype in dtypes:
            for shape in SHAPES:
                x = torch.randn(shape).to(dtype)
                x = x if get_codec(name).signed else x.abs()
                for rounding in ("nearest", "stochastic"):
                    dequantize_blockwise(quantize_blockwise(x, name, rounding=rounding), dtype=dtype)


def steps(chosen: tuple[tuple[str, str], ...]) -> None:
    for rule, state in chosen:
        shapes = [shape for shape in SHAPES if len(shape) == 2 or "muon" not in rule]
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = make(rule, params, lr=1e-3, state=state, **NEEDED.get(rule, {}))
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()


def losses(dtypes: tuple[torch.dtype, ...]) -> None:
    for dtype in dtypes:
        hidden = torch.randn(13, 24).to(dtype).requires_grad_()
        weight = torch.randn(101, 24).to(dtype).requires_grad_()
        linear_cross_entropy(hidden, weight, torch.randint(101, (13,)), softcap=20.0, chunk_bytes=4096).backward()
        contrastive_loss(hidden, torch.randn(13, 24).to(dtype), logit_scale=torch.tensor(3.0)).backward()


def layers(dtypes: tuple[torch.dtype, ...]) -> None:
    for dtype in dtypes:
        for rows, width in ((0, 8), (1, 1), (3, 34), (37, 130)):
            x = torch.randn(rows, width).to(dtype).requires_grad_()
            weight = torch.rand(width).to(dtype).requires_grad_()
            y = layer_norm(rms_norm(x, weight), weight, weight.sin())
            y = swiglu(y, y * 2) + geglu(y, y.flip(0), "tanh") + geglu(y, y)
            if width % 2 == 0:
                angles = torch.rand(rows, width // 2)
                y = rotary_(rotary_(y * 1, angles.cos(), angles.sin()), angles.cos(), angles.sin(), interleaved=True)
            seeded_dropout(packed_relu(y), 0.25, seed=3).sum().backward()
            unpack_mask(pack_mask(x > 0), (rows, width))


def arena() -> None:
    for seed in range(2):
        test_arena.test_replayed_steps_lie_where_the_plan_says(seed)
        test_arena.test_steps_off_the_plan_follow_the_oracle(seed)
    test_arena_sharing.test_threads_share_no_address()


def addresses() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 50, (120, 3), generator=generator).tolist()
    place([Buffer(start, start + length, size) for start, length, size in rows], node_limit=20000)


def together(work: Callable[[], None], threads: int) -> None:
    """The same work on many threads at once, whose failures are not lost."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=guarded) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failures:
        raise failures[0]


def main(much: str, parts: Sequence[str]) -> None:
    every = much == "all"
    names = tuple(codec_names()) if every else tuple(codec_names())[:1]
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if every else (torch.bfloat16,)
    chosen = tuple((rule, state) for rule in rules_by_name() for state in FORMATS) if every else FEW

    def mixed() -> None:
        quantisers(names[:1], dtypes[:1])
        steps(FEW[:1])
        losses(dtypes[:1])

    work: dict[str, Callable[[], object]] = {
        "codecs": lambda: quantisers(names, dtypes),
        "steps": lambda: steps(chosen),
        "losses": lambda: losses(dtypes[:2]),
        "layers": lambda: layers(dtypes),
        "addresses": addresses,
        "arena": arena,
        "threads": lambda: (mixed(), together(mixed, 100)),  # once alone: torch makes caches of its own at first use
    }
    for part in parts or work:
        work[part]()
    sys.stdout.write("exercised\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
