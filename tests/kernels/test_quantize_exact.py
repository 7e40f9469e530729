"""Rounding to nearest against brute force, on every codec and implementation; special values; layouts."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from memopt.kernels import Quantized, codec_names, dequantize_blockwise, get_codec, quantize_blockwise
from memopt.kernels.strided import cut
from tests.kernels.step_cases import ODD_SHAPES, brute_force_excess, data_families, requantized

BACKENDS = ("torch", "native")


@pytest.fixture(params=BACKENDS, autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_KERNELS", request.param)


@pytest.mark.parametrize("name", codec_names())
def test_nearest_is_exact(name: str) -> None:
    for family, x in data_families((7, 900), get_codec(name).signed).items():
        excess = brute_force_excess(x, quantize_blockwise(x, name))
        assert excess.max() <= 0, f"{family}: {excess.max()} at {x.flatten()[excess.argmax()]}"


@pytest.mark.parametrize("name", codec_names())
def test_turning_points(name: str) -> None:
    """At, just below and just above the middle of two neighbours: ties to either, else the nearer one."""
    codec = get_codec(name)
    levels = codec.values()[codec.values().abs() <= 1].double().unique()
    middles = ((levels[1:] + levels[:-1]) / 2).float()
    one = torch.ones(middles.numel(), 1)
    for x in (middles, torch.nextafter(middles, torch.tensor(9.0)), torch.nextafter(middles, torch.tensor(-9.0))):
        rows = torch.cat([one, x[:, None]], 1)  # each row is one block of scale 1
        assert brute_force_excess(rows, quantize_blockwise(rows, name)).max() <= 0


@pytest.mark.parametrize("name", codec_names())
def test_shapes_and_dtypes(name: str) -> None:
    codec = get_codec(name)
    worst = max(codec.values().unique().diff().max() / 2, codec.values().abs().min()) + 0.02
    for shape in ODD_SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(shape).to(dtype)
            q = requantized(x, name)
            assert torch.equal(q.codes, requantized(x.float(), name).codes)  # as exact as float32 inputs
            assert q.codes.shape == codec.blocks(x.shape).code_shape(x.shape, codec.bits)
            y = dequantize_blockwise(q, dtype=dtype)
            assert y.shape == x.shape
            assert y.dtype == dtype
            if x.numel():
                error = (y.float() - (x if codec.signed else x.abs()).float()).abs().max()
                assert error <= worst * x.abs().max()


@pytest.mark.parametrize("name", ["sq127", "root4", "sq15", "dynamic8"])
def test_bytes(name: str) -> None:
    codec = get_codec(name)
    for columns in (codec.block, codec.block + 1, 2 * codec.block - 1, 5 * codec.block + 17):
        q = Quantized.zeros((64, columns), name)
        assert q.nbytes <= 64 * ((columns * codec.bits + 7) // 8 + 1 + columns * 4 / codec.block)


@pytest.mark.parametrize("name", codec_names())
def test_strided_input_and_out(name: str) -> None:
    x = torch.randn(40, 300)
    q, plain = requantized(x.t(), name), requantized(x.t().contiguous(), name)
    assert torch.equal(q.codes, plain.codes)
    out = torch.empty(300, 40)
    assert dequantize_blockwise(q, out=out) is out
    assert torch.equal(out, dequantize_blockwise(plain))


@pytest.mark.parametrize("name", codec_names())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(name: str, bad: float) -> None:
    x = torch.rand(2, 3 * get_codec(name).block)
    x[1, 5] = bad
    for rounding in ("nearest", "stochastic"):
        y = dequantize_blockwise(quantize_blockwise(x, name, rounding=rounding))
        block = get_codec(name).block
        assert y[1, :block].isnan().all()
        assert y[0].isfinite().all()
        assert y[1, block:].isfinite().all()


@pytest.mark.parametrize("name", codec_names())
def test_zero_stays_zero_and_maximum_stays(name: str) -> None:
    assert (dequantize_blockwise(Quantized.zeros((3, 400), name)) == 0).all()
    for rounding in ("nearest", "stochastic"):
        assert (dequantize_blockwise(quantize_blockwise(torch.zeros(3, 400), name, rounding=rounding)) == 0).all()
        y = dequantize_blockwise(quantize_blockwise(torch.full((3, 400), 0.7), name, rounding=rounding))
        torch.testing.assert_close(y, torch.full((3, 400), 0.7), rtol=14 * 2.0**-24, atol=0)  # of decoding: step_cases


def test_second_moments_never_vanish() -> None:
    x = torch.rand(4, 512) * 1e-12
    x[:, 0] = 1.0
    for name in codec_names():
        if not get_codec(name).signed:
            for rounding in ("nearest", "stochastic"):
                assert (dequantize_blockwise(quantize_blockwise(x, name, rounding=rounding)) > 0).all()


def test_fp8_is_torchs() -> None:
    x = torch.randn(8, 256)
    q = quantize_blockwise(x, "e4m3")
    expected = (x * (448 / q.scales)).to(torch.float8_e4m3fn)
    assert torch.equal(q.codes, expected.view(torch.uint8))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="compares with bitsandbytes")
@pytest.mark.parametrize(("name", "signed", "bits"), [("dynamic8", True, 8), ("dynamic8u", False, 8), ("de4", True, 4)])
def test_map_and_blocks_of_bitsandbytes(name: str, signed: bool, bits: int) -> None:
    from bitsandbytes import functional

    table = functional.create_dynamic_map(signed, bits - 1, bits)
    if bits == 4:
        table = table[table.unique().numel() and torch.cat([torch.tensor([True]), table.diff() != 0])]
    assert torch.equal(get_codec(name).values(), table.float())
    if bits == 8:
        x = torch.randn(3000) if signed else torch.rand(3000)
        codes, state = functional.quantize_blockwise(x, code=table, blocksize=256)
        ours = quantize_blockwise(x, name)
        torch.testing.assert_close(ours.scales, state.absmax)
        ours.codes.copy_(codes)
        torch.testing.assert_close(dequantize_blockwise(ours), functional.dequantize_blockwise(codes, state))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codec": "dynamik"}, ValueError, "one of .*dynamic8"),
        ({"rounding": "up"}, ValueError, "'nearest' or 'stochastic'"),
        ({"x": torch.arange(3)}, ValueError, "float32, bfloat16 or float16"),
        ({"x": [1.0]}, TypeError, "must be a tensor"),
        ({"x": torch.eye(3).to_sparse()}, ValueError, "dense"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.randn(3), "codec": "sq127", **change}
    with pytest.raises(error, match=message):
        quantize_blockwise(**arguments)  # type: ignore[arg-type]


def test_bad_out() -> None:
    q = quantize_blockwise(torch.randn(4, 8), "sq127")
    for out in (torch.empty(8, 4), torch.empty(8, 4).t(), torch.empty(4, 8, dtype=torch.int32)):
        with pytest.raises(ValueError, match="out must be"):
            dequantize_blockwise(q, out=out)
    with pytest.raises(ValueError, match="dtype must be"):
        dequantize_blockwise(q, dtype=torch.float64)


@pytest.mark.parametrize("name", codec_names())
def test_cuts_are_rows_and_blocks_of_the_whole(name: str) -> None:
    codec = get_codec(name)
    block, flat = codec.block, (5 * codec.block + 7,)
    for shape, first, last in (
        (flat, 2 * block, 4 * block),
        (flat, block, *flat),
        ((6, block + 9), 2, 5),
        ((6, 2, 3), 0, 4),
        ((), 0, 1),
    ):
        whole = quantize_blockwise(torch.rand(shape) + 0.1, codec)
        decoded = dequantize_blockwise(whole)
        part = dequantize_blockwise(cut(whole, codec, first, last))
        assert torch.equal(part, decoded[first:last] if shape else decoded.reshape(1)), shape
