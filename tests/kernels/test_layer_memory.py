"""The layers against torch's own: values, gradients, and what is kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memopt.kernels.layers import (
    geglu,
    layer_norm,
    pack_mask,
    packed_relu,
    rms_norm,
    rotary_,
    seeded_dropout,
    swiglu,
    unpack_mask,
)
from tests.kernels.loss_cases import error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((5, 3, 16), (7, 33), (40, 300), (1, 1), (0, 8))
LONG = (2, 2**20 + 8)  # takes several pieces; one dtype is enough for what depends on the length alone
LENGTHS = ("layer_norm", "packed_relu", "swiglu")


def weights(D: int) -> Tensor:
    return 0.5 + torch.rand(D, dtype=torch.float64)


def plain_rms(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), w, 1e-6)


def plain_layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), w, b, 1e-5)


LAYERS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[[tuple[int, ...]], list[Tensor]]]] = {
    "rms_norm": (rms_norm, plain_rms, lambda s: [torch.randn(s, dtype=torch.float64), weights(s[-1])]),
    "layer_norm": (
        layer_norm,
        plain_layer,
        lambda s: [torch.randn(s, dtype=torch.float64) + 1, weights(s[-1]), weights(s[-1])],
    ),
    "swiglu": (
        swiglu,
        lambda g, u: F.silu(g) * u,
        lambda s: [torch.randn(s, dtype=torch.float64) * 3, torch.randn(s, dtype=torch.float64)],
    ),
    "geglu": (
        geglu,
        lambda g, u: F.gelu(g) * u,
        lambda s: [torch.randn(s, dtype=torch.float64) * 3, torch.randn(s, dtype=torch.float64)],
    ),
    "geglu_tanh": (
        lambda g, u: geglu(g, u, "tanh"),
        lambda g, u: F.gelu(g, approximate="tanh") * u,
        lambda s: [torch.randn(s, dtype=torch.float64) * 3, torch.randn(s, dtype=torch.float64)],
    ),
    "packed_relu": (packed_relu, F.relu, lambda s: [torch.randn(s, dtype=torch.float64)]),
}


def run(function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
    out = function(*leaves)
    upstream = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
    out.backward(upstream.to(dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(
    ("name", "shape", "dtype"), [*product(LAYERS, SHAPES, DTYPES), *product(LENGTHS, [LONG], [torch.bfloat16])], ids=str
)
def test_matches_torch(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMOPT_KERNELS", backend)
    ours, plain, make = LAYERS[name]
    inputs = [t.to(dtype) for t in make(shape)]
    truth = run(plain, inputs, torch.float64)
    for index, (a, b, exact) in enumerate(zip(run(ours, inputs, dtype), run(plain, inputs, dtype), truth, strict=True)):
        assert a.shape == exact.shape
        if shape == (1, 1) and name == "layer_norm" and index in (1, 2):
            assert not a.any()  # one number is its own mean: float64 leaves roundings of it, these nothing
            continue
        wide = dtype if dtype == torch.float64 else torch.float32
        if shape == (1, 1) and name == "rms_norm" and index == 1:
            # One number's norm hardly depends on it: two terms of this size cancel, each of a few roundings.
            term = inputs[1].double() / (inputs[0].double().square() + 1e-6).sqrt()
            slack = 8 * torch.finfo(wide).eps * term.abs() + torch.finfo(dtype).eps * exact.abs()
            assert (a.double() - exact).abs() <= slack
            continue
        # The truth has float64's own rounding errors.
        floor = (8 if dtype == torch.float64 else 2) * torch.finfo(wide).eps
        if shape == (1, 1):
            # The plain result may be lucky. At x = 4.6 the slope of geglu_tanh takes 14 times what 1 - tanh^2, with
            # two roundings, leaves of 1; beside that a dozen roundings, and the last one.
            floor = 20 * torch.finfo(wide).eps + torch.finfo(dtype).eps / 2
        assert error(a, exact) <= 1.3 * error(b, exact) + floor, (index, error(a, exact), error(b, exact))


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_norm_that_keeps_its_output(
    name: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMOPT_KERNELS", backend)
    ours, plain, make = LAYERS[name]
    inputs = [t.to(dtype) for t in make((40, 64))]
    truth = run(plain, inputs, torch.float64)
    for a, exact in zip(run(lambda *t: ours(*t, keep="output"), inputs, dtype), truth, strict=True):
        assert error(a, exact) < 4 * torch.finfo(dtype).eps  # the rounding of y, once in the value and once in x


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary(dtype: torch.dtype, interleaved: bool) -> None:
    angles = torch.arange(5, dtype=torch.float64).unsqueeze(1) * torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64).to(dtype)
    pairs = x.double().view(2, 3, 5, 3, 2) if interleaved else x.double().view(2, 3, 5, 2, 3).transpose(-1, -2)
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    expected = (turned if interleaved else turned.transpose(-1, -2)).reshape(2, 3, 5, 6)
    leaf = x.clone().requires_grad_()
    moved = leaf * 1
    place = moved.data_ptr()
    out = rotary_(moved, cos, sin, interleaved=interleaved)
    assert out.data_ptr() == place
    assert error(out.detach(), expected) < 2 * torch.finfo(dtype).eps
    upstream = expected.to(dtype)  # a rotation's gradient of its own output is its input
    out.backward(upstream)
    assert error(leaf.grad, x.double()) < 4 * torch.finfo(dtype).eps


def test_dropout_draws_the_same_mask_again() -> None:
    x = torch.ones(200, 500, requires_grad=True)
    y = seeded_dropout(x, 0.3, seed=5)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(y, seeded_dropout(x, 0.3, seed=5))
    assert not torch.equal(y, seeded_dropout(x, 0.3, seed=6))
    torch.manual_seed(3)
    first = seeded_dropout(x, 0.3)
    torch.manual_seed(3)
    assert torch.equal(first, seeded_dropout(x, 0.3))
    # 100 000 draws of 0.7: five standard deviations of the mean are 0.0073.
    assert abs(float((y.detach() > 0).double().mean()) - 0.7) < 0.0073
    torch.testing.assert_close(y.detach().unique(), torch.tensor([0.0, 1 / 0.7]))
    assert seeded_dropout(x, 0.5, training=False) is x
    assert seeded_dropout(x, 0.0) is x
    assert not seeded_dropout(x, 1.0).any()


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000, 2**20 + 3])
def test_bits_round_trip(count: int) -> None:
    flags = torch.rand(count) > 0.5
    packed = pack_mask(flags)
    assert packed.shape == (-(-count // 8),)
    assert torch.equal(unpack_mask(packed, (count,)), flags)
    if count >= 8:
        assert packed[0] == sum(2**bit for bit in range(8) if flags[bit])


def test_masks_and_draws_are_the_same_on_every_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    x, flags = torch.randn(3, 70001), torch.rand(3, 1001) > 0.3
    made = []
    for backend in ("torch", "native"):
        monkeypatch.setenv("MEMOPT_KERNELS", backend)
        made.append((pack_mask(flags), seeded_dropout(x, 0.25, seed=8), unpack_mask(pack_mask(flags), flags.shape)))
    (plain_bits, plain_drawn, plain_flags), (bits, drawn, ours) = made
    assert torch.equal(bits, plain_bits)
    assert torch.equal(ours, plain_flags)
    torch.testing.assert_close(drawn, plain_drawn, rtol=4 * 2.0**-24, atol=0)  # 1 / (1 - p) and the product, on both


def kept_bytes(function: Callable[..., Any], *inputs: Tensor) -> int:
    """Bytes of the storages that autograd keeps, the inputs' own left out."""
    storages: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in inputs}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function(*inputs)
    del out
    return sum(storages.values())


def test_what_is_kept() -> None:
    x, up = (torch.randn(64, 256, requires_grad=True) for _ in range(2))
    w = torch.ones(256, requires_grad=True)
    assert kept_bytes(rms_norm, x, w) == 64 * 4
    assert kept_bytes(layer_norm, x, w) == 2 * 64 * 4
    assert kept_bytes(swiglu, x, up) == 0
    assert kept_bytes(geglu, x, up) == 0
    assert kept_bytes(packed_relu, x) == 64 * 256 // 8
    assert kept_bytes(seeded_dropout, x) == 8  # the seed
    cos, sin = torch.ones(64, 128), torch.zeros(64, 128)
    assert kept_bytes(lambda x: rotary_(x * 1, cos, sin), x) == 2 * 64 * 128 * 4


def test_func_grad_and_second_derivatives() -> None:
    x = torch.randn(4, 8)
    pairs = {
        "rms_norm": (rms_norm, lambda x: F.rms_norm(x, (8,), eps=1e-6)),
        "swiglu": (lambda x: swiglu(x, x + 1), lambda x: F.silu(x) * (x + 1)),
        "packed_relu": (packed_relu, F.relu),
    }
    for name, both in pairs.items():
        ours, theirs = (torch.func.grad(lambda x, f=f: f(x).square().sum())(x) for f in both)
        torch.testing.assert_close(ours, theirs)
        leaf = x.clone().requires_grad_()
        if name == "packed_relu":
            firsts = [torch.autograd.grad(f(leaf).pow(3).sum(), leaf, create_graph=True)[0] for f in both]
            ours, theirs = (torch.autograd.grad(first.sum(), leaf)[0] for first in firsts)
            torch.testing.assert_close(ours, theirs)
        else:
            with pytest.raises(RuntimeError, match="first derivatives only"):
                torch.autograd.grad(both[0](leaf).sum(), leaf, create_graph=True)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x: rms_norm([1.0]), TypeError, "x must be a tensor, got list"),
        (lambda x: rms_norm(x.long()), ValueError, "x must be floating point, got torch.int64"),
        (lambda x: rms_norm(x, x), ValueError, r"weight must have shape \(6,\), got \(4, 6\)"),
        (lambda x: rms_norm(x, eps=-1.0), ValueError, "eps must be a finite number"),
        (lambda x: rms_norm(x, keep="both"), ValueError, "keep must be 'input' or 'output'"),
        (lambda x: rms_norm(x, torch.zeros(6), keep="output"), ValueError, "weight holds a zero"),
        (lambda x: layer_norm(x, None, x[0, :5]), ValueError, r"bias must have shape \(6,\)"),
        (lambda x: rms_norm(torch.ones(())), ValueError, "x must have a last dimension"),
        (lambda x: swiglu(x, x[:2]), ValueError, "gate and up must agree"),
        (lambda x: geglu(x, x, "erf"), ValueError, "approximate must be 'none' or 'tanh'"),
        (lambda x: packed_relu(x.int()), ValueError, "x must be floating point"),
        (lambda x: seeded_dropout(x, "a"), TypeError, "p must be a number, got 'a'"),
        (lambda x: seeded_dropout(x, 1.5), ValueError, r"p must lie in \[0, 1\], got 1.5"),
        (lambda x: pack_mask(x), ValueError, "flags must be boolean"),
        (lambda x: pack_mask([True]), TypeError, "flags must be a tensor, got list"),
        (lambda x: unpack_mask(x, (4, 6)), ValueError, r"packed must be uint8 of shape \(3,\)"),
        (lambda x: rotary_(x[:, :5], x, x), ValueError, "x must have an even last dimension"),
        (lambda x: rotary_(x, x, x), ValueError, r"cos must broadcast to \(4, 3\)"),
        (lambda x: rotary_(x, x[:, :3], x[:, :3].clone().requires_grad_()), ValueError, "sin gets no gradient"),
    ],
)
def test_bad_input_is_named(call: Callable[[Tensor], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(torch.randn(4, 6))
