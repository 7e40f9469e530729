"""Any loss in chunks, against the same function on all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memopt.kernels.losses import chunked_loss, linear_cross_entropy
from tests.kernels.loss_cases import error


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {
        "hidden": torch.randn(7, 5, 8, dtype=dtype).requires_grad_(),
        "weight": torch.randn(11, 8, dtype=dtype).requires_grad_(),
        "bias": torch.randn(11, dtype=dtype).requires_grad_(),
        "rows": torch.randn(7, 5, dtype=dtype).requires_grad_(),
        "shared": torch.tensor(1.7, dtype=dtype).requires_grad_(),
    }


def preference(logits: Tensor, target: Tensor, weights: Tensor, temperature: Tensor) -> Tensor:
    """A loss that is not a sum over positions: a function of each sequence's log-probability."""
    by_sequence = (logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1) * weights).sum(1)
    return -F.logsigmoid(temperature * by_sequence).sum()


@pytest.mark.parametrize("chunk_bytes", [1, 2 * 5 * 11 * 8, 3 * 5 * 11 * 8, None])
def test_matches_the_loss_on_all_logits(chunk_bytes: int | None) -> None:
    t = tensors()
    target = torch.randint(0, 11, (7, 5))
    plain = preference(t["hidden"] @ t["weight"].t() + t["bias"], target, t["rows"], t["shared"]) * 3
    expected = torch.autograd.grad(plain, list(t.values()))
    loss = 3 * chunked_loss(
        preference, t["hidden"], t["weight"], target, t["rows"], bias=t["bias"], shared=[t["shared"]],
        chunk_bytes=chunk_bytes,
    )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss, plain)
    for (name, tensor), gradient in zip(t.items(), expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, msg=name)


def test_cross_entropy_as_a_special_case() -> None:
    results = []
    for function in ("chunked", "linear"):
        torch.manual_seed(3)
        h, w = torch.randn(9, 8).bfloat16().requires_grad_(), torch.randn(11, 8).bfloat16().requires_grad_()
        target = torch.randint(0, 11, (9,))
        if function == "chunked":
            loss = chunked_loss(lambda z, y: F.cross_entropy(z, y, reduction="sum"), h, w, target)
        else:
            loss = linear_cross_entropy(h, w, target, reduction="sum")
        loss.backward()
        assert loss.dtype == torch.float32
        results.append([loss.detach().double(), h.grad.double(), w.grad.double()])
    exact = [t.detach().double().requires_grad_() for t in (h, w)]
    truth = F.cross_entropy(exact[0] @ exact[1].t(), target, reduction="sum")
    truth.backward()
    eps = torch.finfo(torch.bfloat16).eps
    # Logits are rounded to 16 bits, by at most eps / 2 of the largest; a probability changes by at most half of that.
    shift = eps / 2 * float((exact[0] @ exact[1].t()).abs().max().detach())
    for loss, *gradients in results:
        assert abs(loss - truth.detach()) <= 2 * shift * len(target)
        for gradient, leaf, other in zip(gradients, exact, (exact[1], exact[0]), strict=True):
            bound = (shift + eps) * other.detach().abs().sum(0).max() + eps * leaf.grad.abs().max()
            assert (gradient - leaf.grad).abs().max() <= bound


@pytest.mark.parametrize("rows", [60, 100, 300])
def test_weight_gradient_is_rounded_once(rows: int) -> None:
    """One chunk; rows that wait in the gradient (64 of them at most, and 50 in the last chunk); more than those."""
    generator = torch.Generator().manual_seed(2)
    h, w = (torch.randn(n, 64, generator=generator).div(4).bfloat16() for n in (rows, 700))
    target = torch.randint(0, 700, (rows,), generator=generator)
    made = {}
    for accumulate in ("once", "weight", "float32", "truth"):
        exact = accumulate == "truth"
        a, b = ((t.double() if exact else t.clone()).requires_grad_() for t in (h, w))
        options: dict[str, Any] = {} if exact else {"accumulate": accumulate, "chunk_bytes": 50 * 700 * 2}
        chunked_loss(lambda z, y: F.cross_entropy(z, y, reduction="sum"), a, b, target, **options).backward()
        made[accumulate] = b.grad.double()
    errors = {name: float((g - made["truth"]).norm()) for name, g in made.items()}
    assert errors["once"] <= 1.02 * errors["float32"]
    if rows > 60:
        assert errors["weight"] > 1.05 * errors["once"]


def test_chunks_that_do_not_depend_on_the_logits() -> None:
    """The first chunk's value is a constant, the second's gradient has no memory of its own, the third is as usual."""
    values = iter((lambda z: z.new_ones(()), lambda z: z.sum(), lambda z: z.square().sum()))
    h, w = torch.randn(192, 80).bfloat16(), torch.randn(300, 80).bfloat16().requires_grad_()
    chunked_loss(lambda z: next(values)(z), h, w, chunk_bytes=64 * 300 * 2).backward()
    first = h[64:128].double().sum(0).expand(300, 80)
    second = 2 * (w.detach().double() @ h[128:].double().t()) @ h[128:].double()
    assert error(w.grad, first + second) <= 2 * 2.0**-9  # the logits and the sum are rounded once each


def test_autocast_and_func_grad() -> None:
    t = tensors(torch.float32)
    h, w = t["hidden"].detach(), t["weight"].detach()

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return chunked_loss(lambda z: z.square().sum(), h, w)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss(h, w)
    torch.testing.assert_close(cast, loss(h.bfloat16(), w.bfloat16()), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"chunked_loss differentiates fn itself, so not under torch\.func"):
        torch.func.grad(loss)(h, w)


def test_only_what_is_needed() -> None:
    t = tensors()
    with torch.no_grad():
        assert not chunked_loss(lambda z: z.square().sum(), t["hidden"], t["weight"]).requires_grad
    chunked_loss(lambda z: z.square().sum(), t["hidden"].detach(), t["weight"]).backward()
    assert t["weight"].grad is not None
    loss = chunked_loss(lambda z, s: s.square(), t["hidden"].detach(), t["weight"].detach(), shared=[t["shared"]])
    loss.backward()
    torch.testing.assert_close(t["shared"].grad, 2 * t["shared"].detach())


def test_no_rows() -> None:
    h, w = torch.randn(0, 8).requires_grad_(), torch.randn(11, 8).requires_grad_()
    loss = chunked_loss(lambda z: z.sum(), h, w)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not w.grad.any()


def test_second_backward_is_refused() -> None:
    t = tensors()
    loss = chunked_loss(lambda z: z.sum(), t["hidden"], t["weight"])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(chunked_loss(lambda z: z.sum(), t["hidden"], t["weight"]), t["hidden"], create_graph=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it when it resumes after the call
def test_compile_leaves_it_to_eager_mode() -> None:
    t = tensors(torch.float32)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return chunked_loss(lambda z: z.square().sum(), h, w) * 2

    torch.testing.assert_close(
        torch.compile(loss, backend="aot_eager")(t["hidden"], t["weight"]), loss(t["hidden"], t["weight"])
    )


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"fn": lambda z: z}, ValueError, "fn must return a scalar tensor"),
        ({"fn": lambda z: 3.0}, ValueError, "fn must return a scalar tensor, the sum over its chunk; got float"),
        ({"hidden": torch.randn(8)}, ValueError, r"hidden must have shape \(N, ..., H\)"),
        ({"weight": torch.randn(4, 9)}, ValueError, "hidden must end in weight's 9 features"),
        ({"bias": torch.randn(4)}, ValueError, r"bias must have shape \(11,\)"),
        ({"accumulate": "twice"}, ValueError, "accumulate must be one of 'once', 'weight', 'float32', got 'twice'"),
        ({"hidden": None}, TypeError, "hidden must be a tensor, got NoneType"),
        ({"fn": "mean"}, TypeError, "fn must be a function of a chunk of logits, got str"),
        ({"weight": torch.randn(11, 8, device="meta")}, ValueError, "weight is on meta, but hidden is on cpu"),
        ({"hidden": torch.eye(8).to_sparse()}, ValueError, "hidden must be a dense tensor"),
        ({"chunk_bytes": -1}, ValueError, "chunk_bytes must be positive"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "fn": lambda z: z.sum(), "hidden": torch.randn(3, 8), "weight": torch.randn(11, 8)
    } | change  # fmt: skip
    with pytest.raises(kind, match=message):
        chunked_loss(**arguments)


def test_bad_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"rows\[0\] must have first dimension 3"):
        chunked_loss(lambda z, r: z.sum(), torch.randn(3, 8), torch.randn(11, 8), torch.randn(4))
    with pytest.raises(TypeError, match=r"rows\[1\] must be a tensor, got int"):
        chunked_loss(lambda z, r, s: z.sum(), torch.randn(3, 8), torch.randn(11, 8), torch.randn(3), 2)  # type: ignore[arg-type]
