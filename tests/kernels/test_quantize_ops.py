"""Quantise and dequantise as registered operations: opcheck, torch.compile without a break, fake tensors, ``out``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memopt.kernels import Quantized, dequantize_blockwise, get_codec, quantize_blockwise
from memopt.kernels.codecs import is_registered
from memopt.kernels.codecs.power import SignedSquare


@pytest.mark.parametrize(
    ("name", "shape"), [("sq127", (3, 700)), ("sq15", (5, 130)), ("dynamic8", (300,)), ("nf4", ())]
)
def test_opcheck(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    block = get_codec(name).block
    torch.library.opcheck(torch.ops.memopt.quantize_blockwise.default, (x, name, block, "stochastic", 1, 2, 3, 4))
    q = quantize_blockwise(x, name)
    arguments = (q.codes, q.scales, list(shape), name, block, torch.bfloat16)
    torch.library.opcheck(torch.ops.memopt.dequantize_blockwise.default, arguments)


@pytest.mark.parametrize("name", ["sq127", "sq15"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(name: str, dynamic: bool) -> None:
    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        return dequantize_blockwise(quantize_blockwise(x * 2, name, rounding="stochastic", seed=3), dtype=x.dtype) + 1

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (4, 7):
        x = torch.randn(rows, 300)
        assert torch.equal(compiled(x), there_and_back(x))


def test_compiles_with_out() -> None:
    def there_and_back(x: torch.Tensor, held: Quantized, y: torch.Tensor) -> torch.Tensor:
        return dequantize_blockwise(quantize_blockwise(x, "sq15", out=held), out=y) + 1

    x, expected = torch.randn(4, 300), torch.empty(4, 300)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    plain, held = Quantized.zeros((4, 300), "sq15"), Quantized.zeros((4, 300), "sq15")
    y = torch.empty(4, 300)
    assert torch.equal(compiled(x, held, y), there_and_back(x, plain, expected))
    assert torch.equal(held.codes, plain.codes)
    assert torch.equal(y, expected)


def test_fake_tensors_need_no_memory() -> None:
    with FakeTensorMode():
        q = quantize_blockwise(torch.empty(1 << 20, 1 << 20), "sq15")
        assert q.codes.shape == (1 << 20, 1 << 19)
        assert q.scales.shape == (1 << 20, 1 << 13)
        assert dequantize_blockwise(q, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("name", ["sq127", "nf4"])
def test_out_is_written(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_KERNELS", backend)
    x = torch.randn(6, 300)
    expected, out = quantize_blockwise(x, name), Quantized.zeros((6, 300), name)
    versions = out.codes._version, out.scales._version
    assert quantize_blockwise(x, name, out=out) is out
    assert torch.equal(out.codes, expected.codes)
    assert torch.equal(out.scales, expected.scales)
    assert out.codes._version > versions[0]
    assert out.scales._version > versions[1]
    for wrong in (Quantized.zeros((300, 6), name), Quantized.zeros((6, 300), get_codec(name).with_block(64))):
        with pytest.raises(ValueError, match="out must hold"):
            quantize_blockwise(x, name, out=wrong)


def test_large_results_are_written_past_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 32 MiB on; rows of odd length start at every alignment."""
    monkeypatch.setenv("MEMOPT_KERNELS", "native")
    x = torch.randn(8200, 1027)
    q = quantize_blockwise(x, "sq127")
    some = Quantized(q.codes[:99], q.scales[:99], (99, 1027), q.codec)
    for dtype in (torch.float32, torch.bfloat16):
        large = torch.cat([q.codes] * 2), torch.cat([q.scales] * 2)
        y = dequantize_blockwise(Quantized(*large, (16400, 1027), q.codec), dtype=dtype)
        assert torch.equal(y[:99], dequantize_blockwise(some, dtype=dtype))
        assert torch.equal(y[:8200], y[8200:])


def test_a_codec_that_is_not_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_KERNELS", "torch")

    @dataclass(frozen=True)
    class Half(SignedSquare):
        name: str = "half"

        def decode(self, code: Any, scale: Any) -> Any:
            return super().decode(code, scale) * 0.5

    x = torch.randn(4, 300)
    assert is_registered(get_codec("sq127").with_block(64))
    assert not is_registered(Half())
    y = dequantize_blockwise(quantize_blockwise(x, Half()))
    torch.testing.assert_close(y, dequantize_blockwise(quantize_blockwise(x, "sq127")) / 2)


def test_wrong_arguments_are_named() -> None:
    x = torch.randn(4, 300)
    with pytest.raises(TypeError, match="seed must be a whole number, got 'a'"):
        quantize_blockwise(x, "sq127", rounding="stochastic", seed="a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="q must be Quantized, as quantize_blockwise returns it, got Tensor"):
        dequantize_blockwise(x)  # type: ignore[arg-type]
    for block in (0, "a", True):
        with pytest.raises(ValueError, match="block must be a positive whole number"):
            get_codec("nf4").with_block(block)  # type: ignore[arg-type]
