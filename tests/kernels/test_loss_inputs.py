"""What the vocabulary loss makes of its arguments: nothing to count, extreme values, any strides, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memopt.kernels.losses import dense_linear_cross_entropy, linear_cross_entropy
from tests.kernels.loss_cases import TARGET, small_inputs


@pytest.mark.parametrize("mode", ["rows", "recompute"])
def test_nothing_to_count(mode: str) -> None:
    for target, h in ((torch.full((6,), -100), torch.randn(6, 8)), (TARGET[:0], torch.randn(0, 8))):
        for reduction, expected in (("mean", float("nan")), ("sum", 0.0)):
            h, w = h.detach().requires_grad_(), small_inputs()[1]
            loss, stats = linear_cross_entropy(h, w, target, reduction=reduction, mode=mode, return_stats=True)
            torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)
            assert stats.accuracy.isnan()
            loss.backward()
            assert not h.grad.any()
            assert not w.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_logits(dtype: torch.dtype) -> None:
    """Masked entries (a bias of minus infinity), logits of a thousand, and one row of NaN that stays in its row."""
    h, w = (t.detach().to(dtype) for t in small_inputs())
    bias = torch.zeros(9)
    bias[[0, 4]] = -float("inf")
    results = []
    for function, wide in (
        (linear_cross_entropy, dtype),
        (dense_linear_cross_entropy, dtype),
        (dense_linear_cross_entropy, torch.float64),
    ):
        leaf = (h * 300).to(wide).requires_grad_()
        loss, stats = function(leaf, w.to(wide), TARGET, bias.to(wide), reduction="none", return_stats=True)
        loss.sum().backward()
        results.append([loss.double(), leaf.grad.double(), stats.entropy.double()])
    for ours, plain, truth in zip(*results, strict=True):
        assert ours.isfinite().all()
        rounding = (
            torch.finfo(dtype).eps * truth.abs().max()
        )  # of the result itself, which the plain one may be lucky in
        assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + rounding
    bad = h.clone()
    bad[2, 3] = float("nan")
    bad.requires_grad_()
    loss = linear_cross_entropy(bad, w, TARGET, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False, False, False]
    loss.sum().backward()
    assert bad.grad.isnan().any(1).tolist() == [False, False, True, False, False, False]


def strided(dtype: torch.dtype, soft: bool) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves, and arguments made of them of which none is contiguous."""
    generator = torch.Generator().manual_seed(3)
    leaves = [torch.randn(n, generator=generator).to(dtype).requires_grad_() for n in ((5, 4, 2, 16), (16, 70), (140,))]
    target: Tensor = torch.randint(0, 70, (2, 4, 5), generator=generator).permute(2, 1, 0)
    if soft:
        target = torch.rand(70, 2, 4, 5, generator=generator).softmax(0).permute(3, 2, 1, 0)
    class_weight = torch.rand(70, 2, generator=generator)[:, 0].to(dtype)
    hidden, weight, bias = leaves[0][..., ::2], leaves[1].t()[:, 8:], leaves[2][::2]
    arguments = {"hidden": hidden, "weight": weight, "target": target, "bias": bias, "class_weight": class_weight}
    return leaves, arguments


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"chunk_bytes": 3000}, {"mode": "recompute", "chunk_bytes": 3000}, {"reduction": "none"}], ids=str
)
def test_no_input_need_be_contiguous(options: dict[str, Any], soft: bool) -> None:
    plain = {key: value for key, value in options.items() if key == "reduction"}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        results = []
        for function, chosen in ((linear_cross_entropy, options), (dense_linear_cross_entropy, plain)):
            leaves, arguments = strided(dtype, soft)
            results.append(torch.autograd.grad(function(**arguments, **chosen).sum(), leaves))
        for ours, truth in zip(*results, strict=True):
            assert float((ours - truth).norm()) <= tolerance * float(truth.norm())


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_rows_further_apart_than_32_bits_count(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Element 2**31 and beyond; only the pages that rows lie in are ever touched."""
    monkeypatch.setenv("MEMOPT_KERNELS", kind)
    far = torch.empty(2**31 + 300, dtype=torch.bfloat16).as_strided((2, 100), (2**31 + 64, 1))
    far.copy_(torch.randn(2, 100))
    near = far.clone()
    one, target = torch.ones(()), torch.tensor([3, 99])
    rest = (target, None, None, None, one, 0.0)
    for a, b in zip(*(torch.ops.memopt.logit_statistics(x, *rest, True, True) for x in (far, near)), strict=True):
        assert torch.equal(a, b)
    for x in (far, near):
        torch.ops.memopt.softmax_gradient_(
            x, torch.rand(4, 2, generator=torch.Generator().manual_seed(1)), *rest, False
        )
    assert torch.equal(far, near)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": TARGET + 4}, r"target holds -96, which is outside the vocabulary of 9"),
        ({"target": TARGET.clamp_min(0) + 1}, r"target holds 9, which is outside the vocabulary of 9"),
        ({"target": TARGET[:5]}, r"target must have hidden's leading shape \(6,\), got \(5,\)"),
        ({"target": TARGET.int()}, r"target must be int64"),
        ({"target": torch.rand(6, 8)}, r"target with probabilities must have shape \(6, 9\)"),
        ({"hidden": torch.randn(6, 7)}, r"hidden must end in weight's 8 features"),
        ({"hidden": torch.randn(6, 8).double()}, r"hidden is torch.float64 but weight is torch.float32"),
        ({"hidden": torch.ones(6, 8, dtype=torch.int32)}, r"hidden must be one of torch.float32"),
        ({"weight": torch.randn(9)}, r"weight must have shape \(vocabulary, features\)"),
        ({"weight": torch.randn(0, 8)}, r"weight must have at least one row"),
        ({"bias": torch.randn(8)}, r"bias must have shape \(9,\)"),
        ({"class_weight": torch.rand(9, 1)}, r"class_weight must have shape \(9,\)"),
        ({"class_weight": torch.rand(9).requires_grad_()}, r"class_weight gets no gradient"),
        ({"logit_scale": torch.ones(2)}, r"logit_scale must be one number"),
        ({"reduction": "avg"}, r"reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
        ({"mode": "tile"}, r"mode must be one of"),
        ({"accumulate": "bf16"}, r"accumulate must be one of"),
        ({"label_smoothing": 1.5}, r"label_smoothing must lie in \[0, 1\], got 1.5"),
        ({"softcap": -1.0}, r"softcap must be a finite number, not negative, got -1"),
        ({"z_loss": float("nan")}, r"z_loss must be a finite number"),
        ({"chunk_bytes": 0}, r"chunk_bytes must be positive, got 0"),
        ({"shift": 7}, r"shift must lie between 0 and the sequence length 6, got 7"),
        ({"bias": torch.randn(9, device="meta")}, r"bias is on meta, but hidden is on cpu"),
        ({"bias": torch.ones(9, dtype=torch.int64)}, r"bias must be floating point, got torch.int64"),
        ({"weight": torch.eye(9, 8).to_sparse()}, r"weight must be a dense tensor, got layout torch.sparse_coo"),
        (
            {"hidden": torch.ones(6, 0), "weight": torch.ones(9, 0)},
            r"weight must have at least one row and one feature",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {"hidden": torch.randn(6, 8), "weight": torch.randn(9, 8), "target": TARGET} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": [1, 2]}, "target must be a tensor, got list"),
        ({"hidden": None}, "hidden must be a tensor, got NoneType"),
        ({"bias": 1.0}, "bias must be a tensor or None, got float"),
        ({"logit_scale": "2"}, "logit_scale must be a number"),
        ({"logit_scale": True}, "logit_scale must be a number"),
        ({"ignore_index": None}, "ignore_index must be a whole number, got None"),
        ({"shift": 1.0}, "shift must be a whole number, got 1.0 of type float"),
        ({"shift": True}, "shift must be a whole number, got True of type bool"),
        ({"chunk_bytes": "1MiB"}, "chunk_bytes must be a whole number, got '1MiB'"),
        ({"label_smoothing": torch.tensor(0.1)}, "label_smoothing must be a number, got tensor"),
        ({"softcap": "a"}, "softcap must be a number, got 'a'"),
        ({"z_loss": None}, "z_loss must be a number, got None"),
        ({"gradient_filter": "a"}, "gradient_filter must be a number"),
        ({"return_stats": "yes"}, "return_stats must be True or False, got 'yes'"),
        ({"process_group": "world"}, "process_group must be a torch.distributed.ProcessGroup, got 'world'"),
    ],
)
def test_wrong_types_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        linear_cross_entropy(**({"hidden": torch.randn(6, 8), "weight": torch.randn(9, 8), "target": TARGET} | change))
