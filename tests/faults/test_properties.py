"""Properties that hold for any input: of the quantisers, of state dicts, and of the planner's policy."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memopt.kernels import codec_names, dequantize_blockwise, get_codec, quantize_blockwise
from memopt.optim import make
from memopt.planner import plan, validate
from tests.kernels.step_cases import brute_force_excess
from tests.optim.training import assert_same_state, copies, parameters, run, through_file
from tests.planner.toy import CPU, GPU, transformer

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = st.integers(1, 40).flatmap(lambda n: st.lists(st.lists(FLOATS, min_size=n, max_size=n), min_size=1, max_size=3))
SHAPES = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=3)


def tensor(rows: list[list[float]], name: str) -> Tensor:
    x = torch.tensor(rows)
    return x if get_codec(name).signed else x.abs()


@settings(deadline=None, max_examples=150)
@given(rows=ROWS, name=st.sampled_from(codec_names()))
def test_no_code_is_nearer_and_rows_do_not_meet(rows: list[list[float]], name: str) -> None:
    x = tensor(rows, name)
    whole = quantize_blockwise(x, name)
    assert brute_force_excess(x, whole).max() <= 0
    for i in range(len(rows)):
        alone = quantize_blockwise(x[i : i + 1], name)
        assert torch.equal(alone.codes, whole.codes[i : i + 1])
        assert torch.equal(alone.scales, whole.scales[i : i + 1])


@settings(deadline=None, max_examples=100)
@given(rows=ROWS, name=st.sampled_from(codec_names()), seed=st.integers(0, 2**31))
def test_stochastic_rounding_takes_a_neighbour(rows: list[list[float]], name: str, seed: int) -> None:
    """No decoded value lies strictly between the value and the one that stochastic rounding took."""
    x = tensor(rows, name)
    q = quantize_blockwise(x, name, rounding="stochastic", seed=seed)
    taken = dequantize_blockwise(q).double()
    scale = q.scales[:, :1].double()
    levels = q.codec.values().double().unique()
    levels = levels[levels.abs() <= 1]
    for level in levels:
        between = (level * scale - x.double()) * (level * scale - taken)
        # A level that equals one of the two up to the arithmetic's roundings is not between them.
        slack = 64 * 2.0**-24 * torch.maximum(x.abs().double(), taken.abs()) + 6e-45
        inside = (between < 0) & ((level * scale - x).abs() > slack) & ((level * scale - taken).abs() > slack)
        floor = (x > 0) & (level == 0)  # a second moment above zero never becomes zero
        assert not (inside & ~floor).any()


@settings(deadline=None, max_examples=40)
@given(
    shapes=SHAPES,
    rule=st.sampled_from(["adamw", "lion", "adagrad", "lamb", "ademamix"]),
    state=st.sampled_from(["fp32", "bf16", "8bit", "8bit-dynamic", "4bit", "4bit-paper"]),
    steps=st.integers(0, 3),
)
def test_state_dicts_come_back(shapes: list[tuple[int, ...]], rule: str, state: str, steps: int) -> None:
    params = parameters(shapes)
    first = make(rule, params, state=state)
    run(first, steps)
    second = make(rule, copies(params), state=state)
    second.load_state_dict(through_file(first.state_dict()))
    assert_same_state(first, second)
    run(first, range(steps, steps + 2))
    run(second, range(steps, steps + 2))
    assert_same_state(first, second)


@settings(deadline=None, max_examples=25)
@given(
    layers=st.integers(1, 4),
    unit=st.integers(1, 5000),
    logits=st.integers(1, 40),
    flops=st.integers(1, 10**8),
    percent=st.integers(40, 110),
    rates=st.sampled_from([CPU, GPU]),
)
def test_no_plan_breaks_its_budget(
    layers: int, unit: int, logits: int, flops: int, percent: int, rates: object
) -> None:
    trace = transformer(layers, unit, logits, flops)
    budget = trace.peak_bytes * percent // 100
    found = plan(trace, budget, rates)
    assert validate(trace, found, rates).broken is None or found.status == "infeasible"
    if found.status == "infeasible":
        assert found.smallest_budget_bytes is not None
        assert found.smallest_budget_bytes > budget
        again = plan(trace, found.smallest_budget_bytes, rates)
        assert again.status != "infeasible"
    else:
        assert found.peak_bytes <= budget
    if percent >= 100:
        assert found.step_seconds == found.compute_seconds
