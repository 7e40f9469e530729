"""Quantise and dequantise: every codec, to nearest and stochastically, from and to float32 and bfloat16."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu_cases import Case, Place, Timed, plain_torch
from memopt.kernels import codec_names, dequantize_blockwise, get_codec, quantize_blockwise


def cases(place: Place) -> Iterator[Case]:
    for name in codec_names():
        for what in ("quantise", "quantise stochastic", "dequantise"):
            for dtype in (torch.float32, torch.bfloat16):
                if dtype == torch.float32 or name in ("sq127", "sq15"):
                    arguments = (place, name, what, dtype)
                    yield Case(
                        f"{what} {name} {str(dtype)[6:]}",
                        functools.partial(_check, *arguments),
                        functools.partial(_prepare, *arguments),
                    )


def _data(place: Place, name: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(rows, columns, device=place.device).to(dtype)
    return x if get_codec(name).signed else x.abs_()


def _check(place: Place, name: str, what: str, dtype: torch.dtype) -> None:
    x = _data(place, name, 9, 1000, dtype)
    rounding = "stochastic" if "stochastic" in what else "nearest"
    ours = quantize_blockwise(x, name, rounding=rounding, seed=3)
    decoded = dequantize_blockwise(ours, dtype=dtype)
    with plain_torch():
        plain = quantize_blockwise(x, name, rounding=rounding, seed=3)
        expected = dequantize_blockwise(ours, dtype=dtype)
    assert torch.equal(ours.scales, plain.scales), "scales differ"
    share = (ours.codes != plain.codes).float().mean().item()
    assert share <= (0.0 if rounding == "nearest" else 2e-3), f"{share:.2%} of the codes differ"
    torch.testing.assert_close(decoded, expected, rtol=max(2e-6, torch.finfo(dtype).eps), atol=0)


def _prepare(place: Place, name: str, what: str, dtype: torch.dtype) -> Timed:
    x = _data(place, name, place.size(1 << 18, 64), 1024, dtype)
    q, out = quantize_blockwise(x, name), torch.empty_like(x)
    if what == "dequantise":
        run: Callable[[], object] = functools.partial(dequantize_blockwise, q, out=out)
    else:
        rounding = "stochastic" if "stochastic" in what else "nearest"
        run = functools.partial(quantize_blockwise, x, name, rounding=rounding, out=q)
    peers = {}
    if importlib.util.find_spec("bitsandbytes") and name in ("dynamic8", "nf4") and "stochastic" not in what:
        peers["bitsandbytes"] = functools.partial(_bitsandbytes, x, name, what == "dequantise")
    return Timed(run, floor_bytes=x.nbytes + q.nbytes, peers=peers)


def _bitsandbytes(x: torch.Tensor, name: str, decode: bool) -> Callable[[], object]:
    from bitsandbytes import functional as bnb

    if name == "nf4":
        codes, state = bnb.quantize_4bit(x, blocksize=128, quant_type="nf4")
        if decode:
            return lambda: bnb.dequantize_4bit(codes, state)
        return lambda: bnb.quantize_4bit(x, blocksize=128, quant_type="nf4")
    codes, state = bnb.quantize_blockwise(x, blocksize=256)
    if decode:
        return lambda: bnb.dequantize_blockwise(codes, state)
    return lambda: bnb.quantize_blockwise(x, blocksize=256)
