"""Losses beside the plain ones, their inputs, and the memory that a step of them takes; for ``benchmarks.losses``."""

from __future__ import annotations

import importlib.util
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from memopt import contrastive_loss, linear_cross_entropy

HIDDEN, WIDTH = 1024, 256
PAIRS = 16384
PEER = "cut-cross-entropy torch_compile"
Loss = Callable[..., Tensor]


def plain_loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h @ w.t(), y)


def compiled_loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as peer

    return peer(h, w, y, impl="torch_compile")


def plain_contrastive(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    z = scale * (q @ k.t())
    own = torch.arange(z.shape[0])
    return (F.cross_entropy(z, own) + F.cross_entropy(z.t(), own)) / 2


VOCABULARY: dict[str, Loss] = {
    "plain": plain_loss,
    **({PEER: compiled_loss} if importlib.util.find_spec("cut_cross_entropy") else {}),
    "memopt": lambda h, w, y: linear_cross_entropy(h, w, y),
    "memopt, added by chunk": lambda h, w, y: linear_cross_entropy(h, w, y, accumulate="weight"),
    "memopt write-once": lambda h, w, y: linear_cross_entropy(h, w, y, mode="recompute"),
}
CONTRASTIVE: dict[str, Loss] = {
    "plain": plain_contrastive,
    "memopt": lambda q, k, scale: contrastive_loss(q, k, logit_scale=scale),
}


def vocabulary_inputs(V: int, dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
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


def step(function: Loss, inputs: tuple[Tensor, ...]) -> float:
    """Forward and backward into fresh gradients; the loss."""
    for tensor in inputs:
        tensor.grad = None
    loss = function(*inputs)
    loss.backward()
    return float(loss.detach())


def small(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same kind of inputs with 64 rows, to load libraries with."""
    few = tuple(t.detach()[:64].clone() if t.dim() else t.detach().clone() for t in inputs)
    few = (*few[:2], few[2].clamp_max(63) if few[2].dtype == torch.int64 else few[2])
    return tuple(t.requires_grad_(t.is_floating_point()) for t in few)


def products_alone(inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    """The three products of a vocabulary loss over all logits at once, into memory that is there."""
    h, w = (t.detach() for t in inputs[:2])
    z, of_h, of_w = torch.zeros(h.shape[0], w.shape[0], dtype=h.dtype), torch.zeros_like(h), torch.zeros_like(w)

    def run() -> None:
        torch.mm(h, w.t(), out=z)
        torch.mm(z, w, out=of_h)
        torch.mm(z.t(), h, out=of_w)

    return run


def extra_bytes(function: Loss, inputs: tuple[Tensor, ...]) -> int:
    """Peak of resident memory during a step, beyond before it and the gradients. A small step first loads libraries."""
    step(function, small(inputs))
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


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def extra_bytes_apart(kind: str, name: str, V: int, dtype: str, tokens: int) -> int:
    """:func:`extra_bytes` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loss_cases", json.dumps([kind, name, V, dtype, tokens])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    torch.set_num_threads(2)
    kind, name, V, dtype, tokens = json.loads(sys.argv[1])
    inputs = pair_inputs() if kind == "pairs" else vocabulary_inputs(V, getattr(torch, dtype), tokens)
    print(extra_bytes((CONTRASTIVE if kind == "pairs" else VOCABULARY)[name], inputs))


if __name__ == "__main__":
    main()
