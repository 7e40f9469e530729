"""Quantise and dequantise, every codec."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu_cases import Case, Place
from memopt.kernels import codec_names, dequantize_blockwise, get_codec, quantize_blockwise


def cases(place: Place) -> Iterator[tuple[str, Callable[[], Case]]]:
    for name in codec_names():
        for decode in (False, True):
            title = f"{'dequantise' if decode else 'quantise'} {name} fp32"
            yield title, functools.partial(_case, place, name, decode, title)


def _case(place: Place, name: str, decode: bool, title: str) -> Case:
    codec = get_codec(name)
    x = torch.randn(place.size(1 << 18, 64), 1024, device=place.device)
    x = x if codec.signed else x.abs_()
    q, out = quantize_blockwise(x, name), torch.empty_like(x)

    def check() -> None:
        some = x[:64]
        ours = quantize_blockwise(some, name)
        before = os.environ.get("MEMOPT_KERNELS")
        os.environ["MEMOPT_KERNELS"] = "torch"
        try:
            plain = quantize_blockwise(some, name)
            assert torch.equal(ours.codes, plain.codes), f"{(ours.codes != plain.codes).sum()} codes differ"
            expected = dequantize_blockwise(plain)
        finally:
            os.environ.pop("MEMOPT_KERNELS")
            if before is not None:
                os.environ["MEMOPT_KERNELS"] = before
        torch.testing.assert_close(dequantize_blockwise(ours), expected, rtol=2e-6, atol=0)

    peers = {}
    if importlib.util.find_spec("bitsandbytes") and name in ("dynamic8", "nf4"):
        peers["bitsandbytes"] = functools.partial(_bitsandbytes, x, name, decode)
    return Case(
        title,
        (lambda: dequantize_blockwise(q, out=out)) if decode else (lambda: quantize_blockwise(x, name)),
        check,
        floor_bytes=x.numel() * 4 + q.nbytes,
        peers=peers,
    )


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
