"""The vocabulary loss and the contrastive loss, forward and backward."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_cases import Case, Place
from memopt import contrastive_loss, linear_cross_entropy
from memopt.kernels.losses import dense_linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(place: Place) -> Iterator[tuple[str, Callable[[], Case]]]:
    for tokens, vocabulary, width in ((8192, 256000, 2304), (8192, 128256, 4096), (4096, 32000, 4096)):
        title = f"vocabulary loss {tokens} x {vocabulary} x {width} bf16"
        yield title, functools.partial(_vocabulary, place, tokens, vocabulary, width, title)
    yield "contrastive loss 16384 x 512 bf16", functools.partial(_contrastive, place)


def _backward(loss: Loss, h: Tensor, w: Tensor, y: Tensor) -> Callable[[], object]:
    def run() -> None:
        h.grad = w.grad = None
        loss(h, w, y).backward()

    return run


def _vocabulary(place: Place, tokens: int, vocabulary: int, width: int, title: str) -> Case:
    tokens, vocabulary, width = place.size(tokens, 48), place.size(vocabulary, 301), place.size(width, 32)
    h = torch.randn(tokens, width, device=place.device).bfloat16().requires_grad_()
    w = (torch.randn(vocabulary, width, device=place.device) * 0.02).bfloat16().requires_grad_()
    y = torch.randint(vocabulary, (tokens,), device=place.device)

    def check() -> None:
        some, labels = h.detach()[:256].clone().requires_grad_(), y[:256]
        weight = w.detach().clone().requires_grad_()
        loss = linear_cross_entropy(some, weight, labels)
        loss.backward()
        truth, exact = some.detach().float().requires_grad_(), w.detach().float().requires_grad_()
        expected = dense_linear_cross_entropy(truth, exact, labels)
        expected.backward()
        torch.testing.assert_close(loss.float(), expected, rtol=1e-3, atol=1e-3)
        for ours, theirs in ((some.grad, truth.grad), (weight.grad, exact.grad)):
            assert ours is not None
            assert theirs is not None
            error = (ours.float() - theirs).norm() / theirs.norm()
            assert error < 0.01, f"gradient off by {error:.3f} of its norm"

    peers: dict[str, Callable[[], Callable[[], object]]] = {
        "torch plain": lambda: _backward(lambda h, w, y: F.cross_entropy(h @ w.t(), y), h, w, y),
    }
    if place.device.type == "cuda":
        compiled = torch.compile(lambda h, w, y: F.cross_entropy(h @ w.t(), y))
        peers["torch compiled"] = lambda: _backward(compiled, h, w, y)
        if importlib.util.find_spec("cut_cross_entropy"):
            peers["cut-cross-entropy"] = lambda: _backward(_cut_cross_entropy, h, w, y)
        if importlib.util.find_spec("liger_kernel"):
            peers["Liger"] = lambda: _backward(_liger, h, w, y)
    run = _backward(lambda h, w, y: linear_cross_entropy(h, w, y), h, w, y)
    return Case(title, run, check, floor_flops=6 * tokens * vocabulary * width, peers=peers)


def _cut_cross_entropy(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as peer

    return peer(h, w, y)


def _liger(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(w, h, y)


def _contrastive(place: Place) -> Case:
    pairs, width = place.size(16384, 40), place.size(512, 16)
    q, k = (
        F.normalize(torch.randn(pairs, width, device=place.device), dim=-1).bfloat16().requires_grad_() for _ in "qk"
    )
    scale = torch.tensor(20.0, device=place.device)

    def plain(q: Tensor, k: Tensor, _: Tensor) -> Tensor:
        logits = scale * (q @ k.t()).float()
        labels = torch.arange(q.shape[0], device=q.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2

    def ours(q: Tensor, k: Tensor, _: Tensor) -> Tensor:
        return contrastive_loss(q, k, logit_scale=scale)

    def check() -> None:
        some = (q[:256], k[:256], scale)
        torch.testing.assert_close(ours(*some).float(), plain(*some), rtol=5e-3, atol=5e-3)

    return Case(
        f"contrastive loss {pairs} x {width} bf16",
        _backward(ours, q, k, scale),
        check,
        floor_flops=6 * pairs * pairs * width,
        peers={"torch plain": lambda: _backward(plain, q, k, scale)},
    )
