"""The vocabulary loss under torch.compile and on tensors without data, and the memory that it takes for itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from memopt.kernels.losses import linear_cross_entropy
from memopt.kernels.losses.settings import Settings
from tests.kernels.loss_cases import TARGET, small_inputs


@pytest.mark.parametrize("mode", ["rows", "recompute"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("stats", [False, True])
def test_operators_pass_opcheck_and_compile(mode: str, reduction: str, stats: bool) -> None:
    h, w = small_inputs()
    b, s = torch.randn(9).requires_grad_(), torch.tensor(1.3).requires_grad_()
    settings = Settings(reduction=reduction, mode=mode, want_stats=stats, length=6)
    arguments = (h, w, b, s, TARGET, None, [True] * 4, *settings.choices())
    torch.library.opcheck(torch.ops.memopt.linear_cross_entropy.default, arguments)

    def total(h: Tensor, w: Tensor, b: Tensor, s: Tensor) -> Tensor:
        made = linear_cross_entropy(
            2 * h, w, TARGET, b, logit_scale=s, reduction=reduction, mode=mode, return_stats=stats
        )
        return made[0].sum() + made[1].log_sum_exp.square().sum() if stats else 3 * made.sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    plain, ours = (torch.autograd.grad(f(h, w, b, s), (h, w, b, s)) for f in (total, compiled))
    torch.testing.assert_close(ours, plain)


def test_logit_operators_pass_opcheck() -> None:
    logits, one = torch.randn(6, 9), torch.ones(())
    weights, q = torch.rand(9), torch.rand(6, 9)
    statistics = (logits, TARGET, None, weights, q, one, 2.0, True, True)
    torch.library.opcheck(torch.ops.memopt.logit_statistics.default, statistics)
    gradient = (logits, torch.rand(4, 6), TARGET, None, weights, None, one, 2.0, True)
    torch.library.opcheck(torch.ops.memopt.softmax_gradient_.default, gradient)


class _Allocations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[tuple[int, ...], ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(out)
        shapes = tuple(tuple(t.shape) for t in leaves if isinstance(t, Tensor))
        if "empty" in str(func) or "zeros" in str(func) or "memopt" in str(func):
            self.made.append((str(func), shapes))
        return out


@pytest.mark.parametrize("mode", ["rows", "recompute"])
def test_fake_tensors_see_the_same_allocations(mode: str) -> None:
    def run() -> list[Any]:
        h, w = torch.ones(4, 8, 32).requires_grad_(), torch.ones(100, 32).requires_grad_()
        target = torch.zeros(4, 8, dtype=torch.int64)
        with _Allocations() as seen:
            linear_cross_entropy(h, w, target, shift=1, chunk_bytes=4000, logit_scale=2.0, mode=mode).backward()
        assert w.grad.shape == w.shape
        return seen.made

    real = run()
    with FakeTensorMode():
        assert run() == real


def test_meta_tensors() -> None:
    h, w = torch.empty(4, 8, device="meta").requires_grad_(), torch.empty(9, 8, device="meta").requires_grad_()
    linear_cross_entropy(h, w, torch.empty(4, dtype=torch.int64, device="meta")).backward()
    assert w.grad.shape == w.shape


def test_scratch_stays_within_chunk_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = torch.empty

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        out = real(*args, **kwargs)
        sizes.append(out.untyped_storage().nbytes())
        return out

    monkeypatch.setattr(torch, "empty", spy)
    for mode, rows in itertools.product(("rows", "recompute"), (3000, 20)):
        sizes.clear()
        h, w = torch.randn(rows, 8).requires_grad_(), torch.randn(1000, 8).requires_grad_()
        linear_cross_entropy(h, w, torch.zeros(rows, dtype=torch.int64), mode=mode, chunk_bytes=100_000).backward()
        assert max(sizes) <= 100_000
