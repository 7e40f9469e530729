"""4bit-paper's rank-1 scales against the definition, element by element; what takes them; what one infinity spoils."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from memopt.kernels import Quantized, State, dequantize_blockwise
from memopt.optim import AdamW, RMSprop
from memopt.optim.formats import get_format
from memopt.optim.formats.rank_one import Factored, RankOne
from memopt.optim.layout import Extent
from tests.optim.training import assert_resumes_bitwise, gradients, parameters, run

SHAPES: Sequence[tuple[int, ...]] = ((300, 301), (257, 29, 3, 3))
SECOND = State("exp_avg_sq", signed=False)
FORMAT = get_format("4bit-paper")


def matrix(stored: dict[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    """A stored state by the definition: k / 16 times the smaller maximum; a row's first half in low half bytes."""
    columns, codes = stored[f"{name}_column_maxima"], stored[f"{name}_codes"]
    k = torch.cat([codes & 15, codes >> 4], -1)[:, : columns.shape[1]] + 1
    return (k / 16 * torch.minimum(stored[f"{name}_row_maxima"], columns)).view(shape)


def test_a_step_stores_the_nearest_levels_under_the_new_maxima() -> None:
    params = parameters(SHAPES)
    optimizer = AdamW(params, state="4bit-paper")
    run(optimizer, 3)
    before = [matrix(optimizer.state[p], "exp_avg_sq", tuple(p.shape)).double() for p in params]
    run(optimizer, [3])
    for p, old in zip(params, before, strict=True):
        new = (0.999 * old + 0.001 * p.grad.double() ** 2).view(p.shape[0], -1)
        scale = torch.minimum(new.amax(1, keepdim=True), new.amax(0, keepdim=True))
        stored = matrix(optimizer.state[p], "exp_avg_sq", tuple(p.shape)).view_as(new)
        best = (new[..., None] - scale[..., None] * torch.arange(1, 17) / 16).abs().amin(-1)
        # float32 arithmetic: a few roundings of the value, of its scale and of their quotient
        assert ((new - stored).abs() <= best + 8 * 2.0**-24 * scale).all()


def test_everything_else_is_the_one_pass_step_on_the_decoded_moment() -> None:
    """The parameter and the blockwise first moment go as if the second moment were a plain fp32 tensor."""
    ours, plain = parameters(SHAPES), parameters(SHAPES)
    optimizer, other = AdamW(ours, state="4bit-paper"), AdamW(plain, state="fp32")
    run(optimizer, 2)
    run(other, 2)
    for p, q in zip(ours, plain, strict=True):
        stored = optimizer.state[p]
        rows = tuple(p.shape)
        first = Quantized(stored["exp_avg_codes"], stored["exp_avg_scales"], rows, FORMAT.codec(State("exp_avg")))
        other.state[q]["exp_avg"].copy_(dequantize_blockwise(first))
        other.state[q]["exp_avg_sq"].copy_(matrix(stored, "exp_avg_sq", rows))
        q.data.copy_(p.data)
    run(optimizer, [2])
    run(other, [2])
    for p, q in zip(ours, plain, strict=True):
        # Levels times scale and step size are rounded at other places than a decoded tensor: one spacing at most.
        assert ((p - q).abs() <= 2.0**-23 * p.abs() + 2.0**-30).all()


@pytest.mark.parametrize(
    ("shape", "rank_one"),
    [
        ((256, 256), True),
        ((255, 256), False),
        ((4096, 133), True),
        ((4096, 132), False),
        ((128, 1 << 20), False),
        ((300, 50, 3, 3), True),
        ((2, 90000), False),
        ((90000,), False),
    ],
)
def test_rank_one_scales_where_they_cost_no_more_than_blocks(shape: tuple[int, ...], rank_one: bool) -> None:
    assert isinstance(FORMAT, RankOne)
    assert (FORMAT.for_extent(Extent(shape, shape)) == FORMAT) == rank_one


def test_other_unsigned_states_and_amsgrad() -> None:
    params = parameters(SHAPES)
    for optimizer in (AdamW(params, state="4bit-paper", amsgrad=True), RMSprop(params, state="4bit-paper")):
        run(optimizer, 2)
        names = [name for name in optimizer.state[params[0]] if name.endswith("_column_maxima")]
        assert len(names) == (2 if isinstance(optimizer, AdamW) else 1)


def test_resumes_bitwise_with_strides_and_bf16() -> None:
    def build(params: list[Tensor]) -> AdamW:
        return AdamW(params, state="4bit-paper", param_rounding="stochastic")

    conv = torch.nn.Parameter(parameters(SHAPES[1:])[0].detach().to(memory_format=torch.channels_last))
    assert_resumes_bitwise(build, [*parameters(SHAPES[:1], torch.bfloat16), conv])


def test_an_infinite_gradient_spoils_its_own_element_only() -> None:
    params, clean = parameters(SHAPES[:1]), parameters(SHAPES[:1])
    one, two = AdamW(params, state="4bit-paper"), AdamW(clean, state="4bit-paper")
    run(one, 1)
    run(two, 1)
    for bad in (torch.inf, torch.nan):
        for optimizer, some in ((one, params), (two, clean)):
            gradients(some, 1)
            if optimizer is one:
                some[0].grad[7, 9] = bad
            optimizer.step()
    for optimizer, some in ((one, params), (two, clean)):
        gradients(some, 2)
        optimizer.step()
    spoiled = torch.zeros_like(params[0], dtype=torch.bool)
    spoiled[7, 9] = True
    assert torch.equal(~params[0].isfinite(), spoiled)
    # The element is the largest of no row, column or block, so that its neighbours' scales are those without it.
    assert torch.equal(params[0].masked_fill(spoiled, 0.0), clean[0].masked_fill(spoiled, 0.0))
    held = [one.state[params[0]], two.state[clean[0]]]
    for name in ("exp_avg_scales", "exp_avg_sq_row_maxima", "exp_avg_sq_column_maxima"):
        assert torch.equal(held[0][name], held[1][name])


def test_encode_and_decode_are_exact_on_levels() -> None:
    """Levels under their own maxima come back as they are, whatever the rows handled together."""
    shape = (400, 700)
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.rand(400, 1, generator=generator) + 0.5, torch.rand(1, 700, generator=generator) + 0.5
    k = torch.randint(1, 17, shape, generator=generator)
    k[torch.arange(400), torch.arange(400)] = 16
    value = k / 16 * torch.minimum(rows, columns)
    first = FORMAT.encode(SECOND, value, Extent(shape, shape))
    again = FORMAT.decode(SECOND, first, Extent(shape, shape))
    second = FORMAT.encode(SECOND, again, Extent(shape, shape))
    assert all(torch.equal(first[key], second[key]) for key in first)
    held = FORMAT.operand(SECOND, first, Extent(shape, shape))
    assert isinstance(held, Factored)
    assert len(list(held.pieces())) > 2
    assert (again - value).abs().max() <= value.max() / 32 * (1 + 1e-6)
