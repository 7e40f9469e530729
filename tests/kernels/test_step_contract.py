"""What the fused step promises beside its numbers: shards, threads, strides, versions, all or nothing, the backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memopt.kernels import codec_names, get_codec, quantize_blockwise, step
from tests.kernels.step_cases import ADAMW, SCALARS, Kind, codec_of, run_adamw, value, zeros

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("kinds", [("sq127", "root4"), ("sq15", "sqrt"), (BF16, F32)], ids=str)
def test_rows_may_be_sharded(kinds: tuple[Kind, Kind]) -> None:
    """Steps on shards of rows give the same bits as on the whole, stochastic rounding included."""
    generator = torch.Generator().manual_seed(2)
    p0 = torch.randn(9, 700, generator=generator).bfloat16()
    gradients = [torch.randn(9, 700, generator=generator) for _ in range(3)]

    def train(spans: list[tuple[int, int]]) -> list[Tensor]:
        params = [p0[a:b].clone() for a, b in spans]
        states = [[zeros(p.shape, kind) for p in params] for kind in kinds]
        for number, g in enumerate(gradients):
            step(
                ADAMW, params, [g[a:b] for a, b in spans], states, [codec_of(k) for k in kinds], SCALARS, seed=3,
                step=number, numbers=[8] * len(spans), offsets=[2**32 - 1400 + 700 * a for a, _ in spans],
                param_rounding="stochastic",
            )  # fmt: skip
        return [torch.cat(params), *(torch.cat([value(s) for s in stored]) for stored in states)]

    for a, b in zip(train([(0, 9)]), train([(0, 4), (4, 5), (5, 9)]), strict=True):
        assert torch.equal(a, b)


def test_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_KERNELS", "native")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run_adamw([(200, 700), (100000,)], ("sq127", "root4"), steps=2)[0])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("kinds", [("sq127", "root4"), (BF16, F32)], ids=str)
def test_strides(kinds: tuple[Kind, Kind]) -> None:
    """Transposed, channels-last, expanded and sliced tensors give what contiguous ones give."""
    layouts = [
        lambda x: x.t().contiguous().t() if x.dim() == 2 else x,
        lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
        lambda x: torch.stack([x, x], -1)[..., 0],
    ]
    shapes = [(300, 70), (12, 40, 3, 3), (1000,), ()]
    generator = torch.Generator().manual_seed(4)
    p0 = [torch.randn(s, generator=generator) for s in shapes]
    g0 = [torch.randn(s, generator=generator) for s in shapes]
    outcomes = []
    for layout in (lambda x: x, *layouts):
        params = [layout(p.clone()) for p in p0]
        strides = [p.stride() for p in params]
        states = [[zeros(s, kind) if isinstance(kind, str) else layout(torch.zeros(s, dtype=kind)) for s in shapes]
                  for kind in kinds]  # fmt: skip
        for number in range(2):
            step(ADAMW, params, [layout(g) for g in g0], states, [codec_of(k) for k in kinds], SCALARS, step=number)
        assert [p.stride() for p in params] == strides
        outcomes.append([*params, *(value(s) for stored in states for s in stored)])
    for other in outcomes[1:]:
        for a, b in zip(outcomes[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("_backend")
def test_version_counters_and_memory() -> None:
    p = torch.randn(4, 300, requires_grad=True)
    loss = (p * p).sum()
    states = [[zeros(p.shape, "sq127")], [zeros(p.shape, "root4")]]
    step(ADAMW, [p], [torch.ones(4, 300)], states, ["sq127", "root4"], SCALARS)
    assert states[0][0].codes._version  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.usefixtures("_backend")
def test_bad_input_changes_nothing() -> None:
    p, g = torch.randn(4, 300), torch.randn(4, 300)
    good = {
        "params": [p], "grads": [g], "states": [[zeros(p.shape, "sq127")], [torch.zeros(4, 300)]],
        "codecs": ["sq127", None], "scalars": SCALARS,
    }  # fmt: skip
    before = p.clone()
    cases: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"grads": []}, ValueError, "grads must have one entry per parameter"),
        ({"grads": [g[:2]]}, ValueError, r"grads\[0\] must be like params\[0\]"),
        ({"params": [p.long()]}, ValueError, r"params\[0\] must be float32"),
        ({"codecs": ["sq127"]}, ValueError, "codecs must have one entry for each of the 2 states"),
        ({"codecs": ["sq127", "root5"]}, ValueError, "one of .*root4"),
        ({"codecs": ["sq127", "root4"]}, TypeError, r"states\[1\]\[0\] \(v\) must be Quantized"),
        ({"codecs": [None, None]}, TypeError, r"states\[0\]\[0\] \(m\) must be a tensor"),
        ({"codecs": [get_codec("sq127").with_block(100), None]}, ValueError, "scales must be contiguous"),
        ({"scalars": {"lr": 1.0}}, ValueError, "scalars lacks lr_hat, beta1"),
        ({"param_rounding": "up"}, ValueError, "'nearest' or 'stochastic'"),
        ({"offsets": [-1]}, ValueError, r"offsets\[0\] must not be negative"),
        ({"states": [[quantize_blockwise(torch.randn(4, 299), "sq127")], [torch.zeros(4, 300)]]}, ValueError, "codes"),
        ({"states": [[zeros(p.shape, "sq127")], [torch.zeros(4, 299)]]}, ValueError, "float tensor"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            step(ADAMW, **{**good, **change})  # type: ignore[arg-type]
        assert torch.equal(p, before)
    assert step(ADAMW, [], [], [[], []], [None, None], SCALARS) == {}


def test_torch_does_all_of_a_step_whose_kernels_cannot_all_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of two dtypes need two kernels; without one of them nothing is updated twice."""
    from memopt.kernels.native import step as native

    def train(backend: str) -> list[Tensor]:
        monkeypatch.setenv("MEMOPT_KERNELS", backend)
        generator = torch.Generator().manual_seed(5)
        params = [torch.randn(4, 300, generator=generator).to(dtype) for dtype in (F32, BF16, F32)]
        grads = [torch.randn(4, 300, generator=generator) for _ in params]
        states = [[torch.zeros(4, 300) for _ in params] for _ in range(2)]
        step(ADAMW, params, grads, states, [None, None], SCALARS)
        return [*params, *states[0], *states[1]]

    wanted, build = train("torch"), native._kernel
    monkeypatch.setattr(native, "_kernel", lambda kind: None if kind.param == BF16 else build(kind))
    assert all(torch.equal(x, y) for x, y in zip(train("native"), wanted, strict=True))


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_KERNELS", "cuda")
    with pytest.raises(ValueError, match="torch, triton, native"):
        quantize_blockwise(torch.randn(3), "sq127")
    monkeypatch.setenv("MEMOPT_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        quantize_blockwise(torch.randn(3), "sq127")
    assert len(codec_names()) >= 9
