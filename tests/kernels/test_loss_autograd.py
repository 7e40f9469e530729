"""The vocabulary loss in autograd: partial gradients, its transforms, a second backward, autocast."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from memopt.kernels.losses import LossStats, dense_linear_cross_entropy, linear_cross_entropy
from tests.kernels.loss_cases import TARGET, small_inputs


@pytest.mark.parametrize("mode", ["rows", "recompute"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_the_gradients_that_are_needed(reduction: str, mode: str) -> None:
    tensors = [torch.randn(6, 8), torch.randn(9, 8), torch.randn(9), torch.tensor(1.2)]
    full = [t.clone().requires_grad_() for t in tensors]
    options: dict[str, Any] = {"reduction": reduction, "mode": mode}
    dense_linear_cross_entropy(*full[:2], TARGET, full[2], logit_scale=full[3], reduction=reduction).sum().backward()
    for needed in itertools.product([False, True], repeat=4):
        h, w, b, s = (t.clone().requires_grad_(n) for t, n in zip(tensors, needed, strict=True))
        loss = linear_cross_entropy(h, w, TARGET, b, logit_scale=s, **options).sum()
        assert loss.requires_grad == any(needed)
        if any(needed):
            loss.backward()
        for t, truth, n in zip((h, w, b, s), full, needed, strict=True):
            assert (t.grad is not None) == n
            if n:
                torch.testing.assert_close(t.grad, truth.grad)


def test_no_grad_and_inference_give_the_loss_alone() -> None:
    h, w = small_inputs()
    expected = dense_linear_cross_entropy(h, w, TARGET)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = linear_cross_entropy(h, w, TARGET)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected.detach())


def test_log_sum_exp_and_loss_are_differentiable_together() -> None:
    def both(function: Any) -> list[Tensor]:
        torch.manual_seed(1)
        h, w = small_inputs(torch.float64)
        loss, stats = function(h, w, TARGET, return_stats=True)
        (3 * loss + (stats.log_sum_exp * torch.arange(6)).sum()).backward()
        return [h.grad, w.grad]

    for ours, truth in zip(both(linear_cross_entropy), both(dense_linear_cross_entropy), strict=True):
        torch.testing.assert_close(ours, truth)


def test_log_sum_exp_alone() -> None:
    h, w = small_inputs(torch.float64)
    _, stats = linear_cross_entropy(h, w, TARGET, return_stats=True)
    assert isinstance(stats, LossStats)
    stats.log_sum_exp.sum().backward()
    truth = (h @ w.t()).logsumexp(-1)[TARGET != -100].sum()
    torch.testing.assert_close(h.grad, torch.autograd.grad(truth, h)[0])


def test_gradcheck() -> None:
    h, w = small_inputs(torch.float64)
    b, s = torch.randn(9, dtype=torch.float64).requires_grad_(), torch.tensor(0.8, dtype=torch.float64).requires_grad_()
    for choice in ({"reduction": "none"}, {"mode": "recompute"}):  # it calls backward more than once
        options: dict[str, Any] = {"softcap": 2.0, "label_smoothing": 0.1, "z_loss": 0.1, **choice}

        def loss(*t: Tensor, options: dict[str, Any] = options) -> Tensor:
            return linear_cross_entropy(t[0], t[1], TARGET, t[2], logit_scale=t[3], **options)

        assert torch.autograd.gradcheck(loss, (h, w, b, s))


def test_func_grad_and_its_limits() -> None:
    h, w = (t.detach() for t in small_inputs())
    for reduction in ("mean", "none"):
        grads = [
            torch.func.grad(lambda h, w, f=f, r=reduction: f(h, w, TARGET, reduction=r).sum(), argnums=(0, 1))(h, w)
            for f in (linear_cross_entropy, dense_linear_cross_entropy)
        ]
        torch.testing.assert_close(*grads)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.func.grad(lambda a: torch.func.grad(lambda h: linear_cross_entropy(h * a, w, TARGET))(h).sum())(
            torch.ones(())
        )
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda h: linear_cross_entropy(h, w, TARGET))(h[None])


def test_second_backward() -> None:
    h, w = small_inputs()
    loss = linear_cross_entropy(h, w, TARGET)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()
    for options in ({"mode": "recompute"}, {"reduction": "none"}):
        h, w = small_inputs()
        loss = linear_cross_entropy(h, w, TARGET, **options).sum()
        loss.backward(retain_graph=True)
        first = [h.grad.clone(), w.grad.clone()]
        loss.backward()
        torch.testing.assert_close([h.grad, w.grad], [2 * g for g in first])
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(linear_cross_entropy(h, w, TARGET), h, create_graph=True)


def test_autocast_computes_as_linear_would() -> None:
    h, w = small_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(h, w, TARGET, label_smoothing=0.1, mode="recompute")
    loss.backward()
    h2, w2 = (t.detach().bfloat16().requires_grad_() for t in (h, w))
    again = linear_cross_entropy(h2, w2, TARGET, label_smoothing=0.1, mode="recompute")
    again.backward()
    assert h.grad.dtype == torch.float32
    assert loss.dtype == torch.float32
    torch.testing.assert_close([loss, h.grad, w.grad], [again, h2.grad.float(), w2.grad.float()], rtol=0, atol=0)
