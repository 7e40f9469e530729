"""The loss kernels in Triton's interpreter against the plain torch ones; run with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from memopt.kernels.losses import contrastive_loss, dense_linear_cross_entropy, linear_cross_entropy
from memopt.kernels.losses.logits import Logits
from memopt.kernels.losses.logits_torch import logit_statistics as plain_statistics
from memopt.kernels.losses.logits_torch import softmax_gradient_ as plain_gradient_
from tests.kernels.loss_cases import Case, check_as_close, check_no_further

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_KERNELS", "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("R", "V", "cap", "everything"),
    [(3, 5000, 0.0, False), (2, 4096, 5.0, True), (5, 77, 3.0, True), (4, 1, 0.0, False)],
)
@pytest.mark.parametrize("soft", [False, True])
def test_row_kernels(R: int, V: int, cap: float, everything: bool, soft: bool, dtype: torch.dtype) -> None:
    from memopt.kernels.losses import logits_triton

    x = (3 * torch.randn(R, V + 3)).to(dtype)[:, :V]  # rows that do not lie next to each other
    target = torch.randint(0, V, (R,))
    target[0], target[-1] = -1, V  # entries of other ranks
    bias = torch.randn(V) if everything else None
    weights = torch.rand(V) if everything else None
    q = torch.rand(R, V) if soft else None
    rest = (None if soft else target, bias, weights, q, torch.tensor(1.3), cap)
    expected, best = plain_statistics(Logits(x, *rest), True, True)
    ours, argmax = logits_triton.logit_statistics(Logits(x, *rest), True, True)
    assert torch.equal(argmax, best)
    exact = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in rest]
    truth, _ = plain_statistics(Logits(x.double(), *exact), True, True)
    for a, b, t in zip(ours, expected, truth, strict=True):  # maximum, sum, expected, target, weighted
        check_as_close(a, b, t)
    coefficients = torch.rand(4, R)
    coefficients[0] += ours[0] + ours[1].log()
    plain, made, wide = x.clone(), x.clone(), x.double()
    of_scale = plain_gradient_(Logits(wide, *exact), coefficients.double(), True)
    plain_of_scale = plain_gradient_(Logits(plain, *rest), coefficients, True)
    ours_of_scale = logits_triton.softmax_gradient_(Logits(made, *rest), coefficients, True)
    check_as_close(ours_of_scale, plain_of_scale, of_scale)
    check_as_close(made, plain, wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "C"), [(1, 1), (5, 300), (37, 130), (3, 2050)])
def test_pair_kernels(R: int, C: int, dtype: torch.dtype) -> None:
    from memopt.kernels.losses import pairs_torch, pairs_triton

    x = torch.randn(R, C + 3).to(dtype)[:, :C]  # rows that do not lie next to each other
    runs = []
    for use, kind in ((pairs_torch, torch.float32), (pairs_triton, torch.float32), (pairs_torch, torch.float64)):
        scale, coefficient = torch.tensor(4.0, dtype=kind), torch.tensor(0.02).to(kind)
        highest, total = torch.full((C,), -float("inf"), dtype=kind), torch.zeros(C, dtype=kind)
        d = x.to(kind) if kind == torch.float64 else x.clone()
        for part in (d, 2 * d):  # a second chunk merges
            use.column_statistics_(highest, total, part, scale)
        rows = torch.stack([(4.0 * x).float().amax(1), torch.linspace(0.1, 1.0, R)]).to(kind)
        columns = torch.stack([highest, coefficient / total])
        target = torch.arange(R) - 1  # the first row's pair is in another chunk, as may be others
        by_scale = use.pair_gradient_(d, rows, columns, target, coefficient, scale)
        runs.append((highest, total, by_scale, d))
    for plain, ours, truth in zip(*runs, strict=True):
        check_as_close(ours, plain, truth)


def test_contrastive_loss_with_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    queries, keys = torch.randn(40, 8), torch.randn(40, 8)
    for kind, dtype in (("torch", torch.float32), ("triton", torch.float32), ("torch", torch.float64)):
        monkeypatch.setenv("MEMOPT_KERNELS", kind)
        q, k, scale = (t.to(dtype, copy=True).requires_grad_() for t in (queries, keys, torch.tensor(3.0)))
        loss = contrastive_loss(q, k, logit_scale=scale, chunk_bytes=13 * 160)
        loss.backward()
        made.append([loss.detach(), q.grad, k.grad, scale.grad])
    for plain, ours, truth in zip(*made, strict=True):
        check_as_close(ours, plain, truth)


CASES = {
    "plain": Case({}, H=24, V=150),
    "many_row_blocks": Case({}, shape=(131,), H=5, V=70),
    "odd": Case({"reduction": "sum"}, shape=(5,), H=37, V=133, ignored=False),
    "all": Case(
        {"label_smoothing": 0.2, "z_loss": 0.02, "softcap": 6.0, "shift": 1}, bias=True, scale=1.3, class_weight=True
    ),
    "none": Case({"reduction": "none", "softcap": 4.0}, bias=True, scale=0.7),
}


def check(name: str, dtype: torch.dtype, **options: Any) -> None:
    case = CASES[name]
    truth = case.run(dense_linear_cross_entropy, dtype, torch.float64)
    plain = case.run(dense_linear_cross_entropy, dtype, dtype, upcast=False)
    ours = case.run(linear_cross_entropy, dtype, dtype, **options)
    for key, value in ours.items():
        check_no_further(key, value, plain[key], truth[key], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_tiles_match_the_plain_loss(name: str, dtype: torch.dtype) -> None:
    check(name, dtype, mode="tiles", chunk_bytes=64 * 4 * CASES[name].H)  # 64 entries at a time


@pytest.mark.parametrize("mode", ["rows", "recompute"])
@pytest.mark.parametrize("name", CASES)
def test_other_modes_with_triton_kernels(name: str, mode: str) -> None:
    check(name, torch.bfloat16, mode=mode)


def peaked() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that point at their targets: most tiles hold next to no probability."""
    torch.manual_seed(2)
    weight = torch.nn.functional.normalize(torch.randn(300, 16))
    target = torch.arange(40)
    return 30 * weight[target], weight, target


def test_filter_drops_only_what_is_below_it() -> None:
    results = []
    for threshold in (0.0, 2.0**-12, 0.9):
        h, w, y = peaked()
        h.requires_grad_(), w.requires_grad_()
        linear_cross_entropy(h, w, y, reduction="sum", mode="tiles", gradient_filter=threshold).backward()
        results.append((h.grad, w.grad))
    (h0, w0), (h1, w1), (h2, w2) = results
    # At most every dropped entry is below the threshold: it moves a gradient by less than that times the operand.
    bound = 2.0**-12 * 300 * float(peaked()[1].abs().max())
    assert 0 < float((h1 - h0).abs().max()) < bound
    assert float((w1 - w0).abs().max()) < 2.0**-12 * 40 * float(peaked()[0].abs().max())
    assert not h2.any()
    assert not w2.any()


def test_entries_in_another_order_change_nothing_but_rounding() -> None:
    """A filter below every probability skips nothing, but entries are met in the order of their mean logits."""
    case = Case({"label_smoothing": 0.1}, H=24, V=150, bias=True, scale=1.3, class_weight=True)
    plain, ordered = (
        case.run(linear_cross_entropy, torch.float32, torch.float32, mode="tiles", gradient_filter=f, chunk_bytes=6144)
        for f in (0.0, 1e-30)
    )
    truth = case.run(dense_linear_cross_entropy, torch.float32, torch.float64)
    for name, ours in ordered.items():
        check_no_further(name, ours, plain[name], truth[name], torch.float32)


def test_tiles_refuse_what_they_cannot_do() -> None:
    h, w, y = peaked()
    with pytest.raises(ValueError, match="takes float32, bfloat16 and float16"):
        linear_cross_entropy(h.double(), w.double(), y, mode="tiles")
    with pytest.raises(ValueError, match="takes int64 targets"):
        linear_cross_entropy(h, w, torch.rand(40, 300), mode="tiles")
    with pytest.raises(ValueError, match=r"gradient_filter works in mode='tiles' only, got mode='rows'"):
        linear_cross_entropy(h, w, y, gradient_filter=0.1)
    with pytest.raises(ValueError, match=r"gradient_filter must lie in \[0, 1\)"):
        linear_cross_entropy(h, w, y, mode="tiles", gradient_filter=1.0)
