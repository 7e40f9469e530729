"""The vocabulary loss and the contrastive loss, forward and backward."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_cases import Case, Place, Timed
from memopt import contrastive_loss, linear_cross_entropy
from memopt.kernels.losses import dense_linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(place: Place) -> Iterator[Case]:
    for tokens, vocabulary, width in ((8192, 256000, 2304), (8192, 128256, 4096), (4096, 32000, 4096)):
        for mode in ("rows", "tiles", "recompute"):
            if mode == "tiles" and place.device.type != "cuda":
                continue
            yield Case(
                f"vocabulary loss {tokens} x {vocabulary} x {width} bf16, {mode}",
                functools.partial(_check_vocabulary, place, mode),
                functools.partial(_vocabulary, place, tokens, vocabulary, width, mode),
                first=vocabulary == 256000 and mode != "recompute",
            )
    yield Case(
        "contrastive loss 16384 x 512 bf16",
        functools.partial(_check_contrastive, place),
        functools.partial(_contrastive, place),
    )


def _backward(loss: Loss, h: Tensor, w: Tensor, y: Tensor) -> Callable[[], object]:
    def run() -> None:
        h.grad = w.grad = None
        loss(h, w, y).backward()

    return run


def _check_vocabulary(place: Place, mode: str) -> None:
    h = torch.randn(250, 96, device=place.device).bfloat16().requires_grad_()
    w = (torch.randn(3001, 96, device=place.device) * 0.1).bfloat16().requires_grad_()
    y = torch.randint(3001, (250,), device=place.device)
    y[::7] = -100
    loss = linear_cross_entropy(h, w, y, mode=mode)
    loss.backward()
    truth, exact = (t.detach().float().requires_grad_() for t in (h, w))
    expected = dense_linear_cross_entropy(truth, exact, y)
    expected.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=1e-3, atol=1e-3)
    for ours, theirs in ((h.grad, truth.grad), (w.grad, exact.grad)):
        assert ours is not None
        assert theirs is not None
        error = (ours.float() - theirs).norm() / theirs.norm()
        assert error < 0.01, f"gradient off by {error:.3f} of its norm"


def _vocabulary(place: Place, tokens: int, vocabulary: int, width: int, mode: str) -> Timed:
    tokens, vocabulary, width = place.size(tokens, 48), place.size(vocabulary, 301), place.size(width, 32)
    h = torch.randn(tokens, width, device=place.device).bfloat16().requires_grad_()
    w = (torch.randn(vocabulary, width, device=place.device) * 0.02).bfloat16().requires_grad_()
    y = torch.randint(vocabulary, (tokens,), device=place.device)
    run = _backward(lambda h, w, y: linear_cross_entropy(h, w, y, mode=mode), h, w, y)
    timed = Timed(run, floor_flops=6 * tokens * vocabulary * width)
    if mode != "rows":
        return timed
    timed.peers["torch plain"] = lambda: _backward(lambda h, w, y: F.cross_entropy(h @ w.t(), y), h, w, y)
    if place.device.type == "cuda":
        compiled = torch.compile(lambda h, w, y: F.cross_entropy(h @ w.t(), y))
        timed.peers["torch compiled"] = lambda: _backward(compiled, h, w, y)
        if importlib.util.find_spec("cut_cross_entropy"):
            timed.peers["cut-cross-entropy"] = lambda: _backward(_cut_cross_entropy, h, w, y)
        if importlib.util.find_spec("liger_kernel"):
            timed.peers["Liger"] = lambda: _backward(_liger, h, w, y)
    return timed


def _cut_cross_entropy(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as peer

    return peer(h, w, y)


def _liger(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(w, h, y)


def _pairs(place: Place, pairs: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k = (torch.randn(pairs, width, device=place.device) for _ in "qk")
    q, k = (F.normalize(t, dim=-1).bfloat16().requires_grad_() for t in (q, k))
    return q, k, torch.tensor(20.0, device=place.device)


def _plain_contrastive(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    logits = scale * (q @ k.t()).float()
    labels = torch.arange(q.shape[0], device=q.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def _our_contrastive(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    return contrastive_loss(q, k, logit_scale=scale)


def _check_contrastive(place: Place) -> None:
    q, k, scale = _pairs(place, 300, 48)
    torch.testing.assert_close(
        _our_contrastive(q, k, scale).float(), _plain_contrastive(q, k, scale), rtol=5e-3, atol=5e-3
    )


def _contrastive(place: Place) -> Timed:
    pairs, width = place.size(16384, 40), place.size(512, 16)
    q, k, scale = _pairs(place, pairs, width)
    return Timed(
        _backward(_our_contrastive, q, k, scale),
        floor_flops=6 * pairs * pairs * width,
        peers={"torch plain": lambda: _backward(_plain_contrastive, q, k, scale)},
    )
