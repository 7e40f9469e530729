"""What surrounds the vocabulary loss: transforms, tracing, partial gradients, extreme values, bad input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from memopt.kernels.losses import LossStats, dense_linear_cross_entropy, linear_cross_entropy
from memopt.kernels.losses.settings import Settings

TARGET = torch.tensor([1, 2, 3, -100, 5, 8])


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(6, 8, dtype=dtype).requires_grad_(), torch.randn(9, 8, dtype=dtype).requires_grad_()


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
    h, w = inputs()
    expected = dense_linear_cross_entropy(h, w, TARGET)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = linear_cross_entropy(h, w, TARGET)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected.detach())


def test_log_sum_exp_and_loss_are_differentiable_together() -> None:
    def both(function: Any) -> list[Tensor]:
        torch.manual_seed(1)
        h, w = inputs(torch.float64)
        loss, stats = function(h, w, TARGET, return_stats=True)
        (3 * loss + (stats.log_sum_exp * torch.arange(6)).sum()).backward()
        return [h.grad, w.grad]

    for ours, truth in zip(both(linear_cross_entropy), both(dense_linear_cross_entropy), strict=True):
        torch.testing.assert_close(ours, truth)


def test_log_sum_exp_alone() -> None:
    h, w = inputs(torch.float64)
    _, stats = linear_cross_entropy(h, w, TARGET, return_stats=True)
    assert isinstance(stats, LossStats)
    stats.log_sum_exp.sum().backward()
    truth = (h @ w.t()).logsumexp(-1)[TARGET != -100].sum()
    torch.testing.assert_close(h.grad, torch.autograd.grad(truth, h)[0])


def test_gradcheck() -> None:
    h, w = inputs(torch.float64)
    b, s = torch.randn(9, dtype=torch.float64).requires_grad_(), torch.tensor(0.8, dtype=torch.float64).requires_grad_()
    for choice in ({"reduction": "none"}, {"mode": "recompute"}):  # it calls backward more than once
        options: dict[str, Any] = {"softcap": 2.0, "label_smoothing": 0.1, "z_loss": 0.1, **choice}

        def loss(*t: Tensor, options: dict[str, Any] = options) -> Tensor:
            return linear_cross_entropy(t[0], t[1], TARGET, t[2], logit_scale=t[3], **options)

        assert torch.autograd.gradcheck(loss, (h, w, b, s))


def test_func_grad_and_its_limits() -> None:
    h, w = (t.detach() for t in inputs())
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
    h, w = inputs()
    loss = linear_cross_entropy(h, w, TARGET)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()
    for options in ({"mode": "recompute"}, {"reduction": "none"}):
        h, w = inputs()
        loss = linear_cross_entropy(h, w, TARGET, **options).sum()
        loss.backward(retain_graph=True)
        first = [h.grad.clone(), w.grad.clone()]
        loss.backward()
        torch.testing.assert_close([h.grad, w.grad], [2 * g for g in first])
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(linear_cross_entropy(h, w, TARGET), h, create_graph=True)


def test_autocast_computes_as_linear_would() -> None:
    h, w = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(h, w, TARGET, label_smoothing=0.1, mode="recompute")
    loss.backward()
    h2, w2 = (t.detach().bfloat16().requires_grad_() for t in (h, w))
    again = linear_cross_entropy(h2, w2, TARGET, label_smoothing=0.1, mode="recompute")
    again.backward()
    assert h.grad.dtype == torch.float32
    assert loss.dtype == torch.float32
    torch.testing.assert_close([loss, h.grad, w.grad], [again, h2.grad.float(), w2.grad.float()], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["rows", "recompute"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("stats", [False, True])
def test_operators_pass_opcheck_and_compile(mode: str, reduction: str, stats: bool) -> None:
    h, w = inputs()
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


@pytest.mark.parametrize("mode", ["rows", "recompute"])
def test_nothing_to_count(mode: str) -> None:
    for target, h in ((torch.full((6,), -100), torch.randn(6, 8)), (TARGET[:0], torch.randn(0, 8))):
        for reduction, expected in (("mean", float("nan")), ("sum", 0.0)):
            h, w = h.detach().requires_grad_(), inputs()[1]
            loss, stats = linear_cross_entropy(h, w, target, reduction=reduction, mode=mode, return_stats=True)
            torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)
            assert stats.accuracy.isnan()
            loss.backward()
            assert not h.grad.any()
            assert not w.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_logits(dtype: torch.dtype) -> None:
    """Masked entries (a bias of minus infinity), logits of a thousand, and one row of NaN that stays in its row."""
    h, w = (t.detach().to(dtype) for t in inputs())
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
