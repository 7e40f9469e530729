"""The contrastive loss against the plain one on the whole similarity matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memopt.kernels.losses import contrastive_loss
from tests.kernels.loss_cases import error, ratio_limit


def plain(queries: Tensor, keys: Tensor, *, logit_scale: Tensor) -> Tensor:
    z = logit_scale * (queries @ keys.t())
    own = torch.arange(z.shape[0])
    return (F.cross_entropy(z, own) + F.cross_entropy(z.t(), own)) / 2


def run(function: Any, inputs: list[Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    q, k, scale = (t.to(dtype, copy=True).requires_grad_() for t in inputs)
    loss = function(q, k, logit_scale=scale, **options)
    (1.7 * loss).backward()
    return [loss.detach(), q.grad, k.grad, scale.grad]


def pairs(N: int, D: int, dtype: torch.dtype, scale: float = 14.3) -> list[Tensor]:
    q = F.normalize(torch.randn(N, D, dtype=torch.float64), dim=1)
    k = F.normalize(q + torch.randn(N, D, dtype=torch.float64) / 4, dim=1)
    return [t.to(dtype) for t in (q, k, torch.tensor(scale, dtype=torch.float64))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("N", "D", "rows"), [(1, 3, 1), (2, 8, 1), (13, 24, 5), (513, 16, 100), (300, 2, 300)])
def test_matches_the_plain_loss(N: int, D: int, rows: int, dtype: torch.dtype) -> None:
    inputs = pairs(N, D, dtype)
    truth, same = run(plain, inputs, torch.float64), run(plain, inputs, dtype)
    ours = run(contrastive_loss, inputs, dtype, chunk_bytes=rows * N * dtype.itemsize)
    noise = 1e-14 if dtype == torch.float64 else 1e-6
    for name, value, by_plain, exact in zip(("loss", "queries", "keys", "scale"), ours, same, truth, strict=True):
        # A value that cancels to nearly nothing, such as the loss of one pair, is measured against one, and the
        # gradient of the scale against the terms it is the sum of: scale * d/dscale = sum_i <q_i, d/dq_i>.
        size = max(1.0, float(exact.norm())) if N < 3 else float(exact.norm())
        if name == "scale":
            size = max(size, float((inputs[0].double() * truth[1]).sum(1).abs().sum() / truth[0].new_tensor(14.3)))
        distance, plains = ((v.double() - exact).norm() / size for v in (value, by_plain))
        floor = torch.finfo(dtype).eps if name in ("loss", "scale") else noise
        limit = ratio_limit(value, by_plain, exact) * plains + max(noise, floor)
        assert distance <= limit, (name, distance, limit)


def test_chunking_changes_nothing_but_rounding() -> None:
    inputs = pairs(200, 16, torch.float32)
    for rows in (1, 7, 199):
        many = run(contrastive_loss, inputs, torch.float32, chunk_bytes=rows * 800)
        for a, b in zip(many, run(contrastive_loss, inputs, torch.float32), strict=True):
            assert error(a, b.double()) < 2e-6


def test_large_similarities_do_not_overflow() -> None:
    inputs = pairs(40, 8, torch.float32, scale=5000.0)
    for ours, truth in zip(
        run(contrastive_loss, inputs, torch.float32), run(plain, inputs, torch.float64), strict=True
    ):
        assert error(ours, truth) < 2e-3


def test_backward_again_func_grad_no_grad_and_fake_tensors() -> None:
    q, k, scale = (t.requires_grad_() for t in pairs(9, 4, torch.float64))
    loss = contrastive_loss(q, k, logit_scale=scale)
    loss.backward(retain_graph=True)
    first = q.grad.clone()
    loss.backward()
    torch.testing.assert_close(q.grad, 2 * first)
    by_func = torch.func.grad(lambda q: contrastive_loss(q, k.detach(), logit_scale=10.0))(q.detach())
    torch.testing.assert_close(by_func, torch.func.grad(lambda q: plain(q, k.detach(), logit_scale=10.0))(q.detach()))
    with torch.no_grad():
        assert not contrastive_loss(q, k, logit_scale=scale).requires_grad
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(contrastive_loss(q, k, logit_scale=scale), q, create_graph=True)
    with FakeTensorMode():
        q = torch.ones(9, 4).requires_grad_()
        contrastive_loss(q, torch.ones(9, 4), logit_scale=2.0).backward()
        assert q.grad.shape == q.shape


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it when it resumes after the call
def test_autocast_and_compile() -> None:
    inputs = [t.requires_grad_() for t in pairs(9, 4, torch.float32)]

    def loss(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        return contrastive_loss(q, k, logit_scale=scale) * 2

    compiled = torch.compile(loss, backend="aot_eager")
    ours, plain_run = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss))
    torch.testing.assert_close(ours, plain_run)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss(*inputs)
    narrow = [inputs[0].bfloat16(), inputs[1].bfloat16(), inputs[2]]
    torch.testing.assert_close(cast, loss(*narrow), rtol=0, atol=0)


def test_operators_pass_opcheck() -> None:
    x, one = torch.randn(5, 7), torch.ones(())
    torch.library.opcheck(torch.ops.memopt.column_statistics_.default, (torch.zeros(7), torch.ones(7), x, 2 * one))
    torch.library.opcheck(
        torch.ops.memopt.pair_gradient_.default, (x, torch.rand(2, 5), torch.rand(2, 7), torch.arange(5), one, 2 * one)
    )


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"keys": torch.randn(5, 4)}, ValueError, r"queries and keys must have one shape, got \(6, 4\) and \(5, 4\)"),
        ({"queries": torch.randn(6)}, ValueError, r"queries must have shape \(pairs, width\)"),
        ({"keys": torch.randn(6, 4).double()}, ValueError, "queries are torch.float32 but keys torch.float64"),
        ({"keys": torch.ones(6, 4, dtype=torch.int64)}, ValueError, "keys must be one of torch.float32"),
        ({"logit_scale": torch.ones(2)}, ValueError, "logit_scale must be one number"),
        ({"logit_scale": None}, TypeError, "logit_scale must be a number or a scalar tensor"),
        ({"keys": [1]}, TypeError, "keys must be a tensor, got list"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be positive"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"queries": torch.randn(6, 4), "keys": torch.randn(6, 4), "logit_scale": 1.0} | change
    with pytest.raises(kind, match=message):
        contrastive_loss(**arguments)
