"""LowRankDCT: the basis, the choice of columns, its limits, and a plain float64 run of the method."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt.optim
from memopt.optim import AdamW, AdamW8bit, LowRankDCT
from memopt.optim.coverage import dct
from tests.optim.coverage_models import assert_same, tiny, train, values


def basis(length: int) -> Tensor:
    """By the definition, in float64."""
    j, k = torch.arange(length).double()[:, None], torch.arange(length).double()[None]
    full = torch.cos(math.pi * (2 * j + 1) * k / (2 * length)) * math.sqrt(2 / length)
    full[:, 0] = math.sqrt(1 / length)
    return full


@pytest.mark.parametrize("length", [1, 2, 3, 8, 61, 500])
def test_columns_and_transform_are_the_orthonormal_dct(length: int) -> None:
    full = basis(length)
    torch.testing.assert_close(full.T @ full, torch.eye(length).double())
    assert (dct.columns(length, torch.arange(length)) - full).abs().max() < 2e-7
    rows = torch.randn(5, length)
    plain = (rows @ full.float() - rows.double() @ full).abs().max()
    assert (dct.transform(rows) - rows.double() @ full).abs().max() <= 4 * plain + 1e-6


@pytest.mark.parametrize("chunk", [1, 37, 1 << 22])
@pytest.mark.parametrize("along_rows", [False, True])
def test_weights_project_and_expand(along_rows: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dct, "CHUNK", chunk)
    matrix = torch.randn(19, 31)
    full = basis(19 if along_rows else 31)
    coefficients = full.T @ matrix.double() if along_rows else matrix.double() @ full
    sums = coefficients.abs().sum(1 if along_rows else 0)
    # A float32 sum of n products is off by at most n eps times the sum of their magnitudes; then come sums of those.
    eps, inner = torch.finfo(torch.float32).eps, len(full)
    sizes = full.T.abs() @ matrix.double().abs() if along_rows else matrix.double().abs() @ full.abs()
    bound = (inner + sum(matrix.shape)) * eps * sizes.sum(1 if along_rows else 0)
    assert ((dct.weights(matrix, along_rows=along_rows).double() - sums).abs() <= bound).all()
    chosen = torch.tensor([7, 0, 18, 3], dtype=torch.int32)
    expected = coefficients[chosen] if along_rows else coefficients[:, chosen]
    got = dct.project(matrix, chosen, along_rows=along_rows)
    largest = (sizes[chosen] if along_rows else sizes[:, chosen]) * eps * (inner + 1)
    assert ((got.double() - expected).abs() <= largest).all()
    back = torch.cat(
        [
            dct.expand(got, dct.columns(len(full), chosen), part, along_rows=along_rows)
            for part in dct.row_chunks(matrix)
        ]
    )
    whole = full[:, chosen] @ expected if along_rows else expected @ full[:, chosen].T
    columns = full[:, chosen].abs()
    largest += len(chosen) * eps * expected.abs() + eps * expected.abs()
    assert ((back.double() - whole).abs() <= (columns @ largest if along_rows else largest @ columns.T)).all()


@pytest.mark.parametrize("base", [AdamW, AdamW8bit, torch.optim.AdamW, torch.optim.SGD])
def test_full_rank_is_the_base_optimizer_bitwise(base: Any) -> None:
    ours, plain = tiny(), tiny()
    losses = train(ours, LowRankDCT(ours, base, rank=144, lr=1e-2), range(4))
    assert losses == train(plain, base(plain.parameters(), lr=1e-2), range(4))
    assert_same(values(ours), values(plain))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_gradients_within_the_rank_give_plain_momentum_up_to_rounding(shape: tuple[int, int]) -> None:
    """SGD with momentum commutes with rotations, so where nothing is cut off the basis must not matter."""
    start = torch.randn(shape)
    ours, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    lowrank = LowRankDCT([ours], torch.optim.SGD, rank=6, switch_every=100, lr=0.1, momentum=0.9)
    reference = torch.optim.SGD([plain], lr=0.1, momentum=0.9)
    full = basis(24)[:, [0, 2, 3, 11, 17, 23]]
    eps, momentum, bound = torch.finfo(torch.float32).eps, torch.zeros(()), torch.zeros(40, 24).double()
    for step in range(6):
        coefficients = torch.randn(40, 6, generator=torch.Generator().manual_seed(step)).double()
        gradient = (coefficients @ full.T).float()
        ours.grad = plain.grad = gradient if shape == (40, 24) else gradient.T.contiguous()
        lowrank.step()
        reference.step()
        # Of one gradient's part in the momentum: projected (a sum of 24 products), added up, expanded (a sum of 6).
        sizes = gradient.double().abs() @ full.abs() @ full.abs().T
        momentum = 0.9 * momentum + (24 + 6 + 3) * eps * sizes
        bound += 0.1 * momentum + eps * (start.abs().max() + 0.1 * sizes)  # and the parameters' own rounding, in both
    assert sorted(lowrank.state[ours]["columns"].tolist()) == [0, 2, 3, 11, 17, 23]
    difference = (ours.detach() - plain.detach()).double().abs()
    assert ((difference if shape == (40, 24) else difference.T) <= bound).all()


class PlainDCTAdam:
    """The method for one tall matrix in the weight's type, moments kept per basis column so that old ones are lost."""

    def __init__(self, weight: Tensor, rank: int, every: int, lr: float, decay: float) -> None:
        self.weight, self.rank, self.every, self.lr, self.decay = weight, rank, every, lr, decay
        self.full = basis(weight.shape[1]).to(weight.dtype)
        self.m, self.v = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.count = 0
        self.chosen = torch.zeros(0, dtype=torch.long)

    def step(self, gradient: Tensor) -> None:
        every_coefficient = gradient.to(self.full.dtype) @ self.full
        if self.count % self.every == 0:
            self.chosen = every_coefficient.abs().sum(0).topk(self.rank).indices
            lost = torch.ones(len(self.full), dtype=torch.bool)
            lost[self.chosen] = False
            self.m[:, lost] = 0
            self.v[:, lost] = 0
        self.count += 1
        r, c, t = every_coefficient[:, self.chosen], self.chosen, self.count
        self.m[:, c] = 0.9 * self.m[:, c] + 0.1 * r
        self.v[:, c] = 0.999 * self.v[:, c] + 0.001 * r**2
        update = (self.m[:, c] / (1 - 0.9**t)) / ((self.v[:, c] / (1 - 0.999**t)).sqrt() + 1e-8)
        self.weight = self.weight * (1 - self.lr * self.decay) - self.lr * update @ self.full[:, c].T


@pytest.mark.parametrize("shape", [(50, 21), (21, 50), (18, 3, 7)])
@pytest.mark.parametrize("base", [torch.optim.AdamW, AdamW])
def test_adam_on_chosen_columns_against_float64(base: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    weight = nn.Parameter(torch.randn(shape))
    options = {"state": "fp32"} if base is AdamW else {}
    optimizer = LowRankDCT([weight], base, rank=5, switch_every=3, lr=1e-2, weight_decay=0.1, **options)
    matrix = weight.detach().flatten(1).clone()
    turned = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if turned else matrix
    truth, plain = (PlainDCTAdam(tall.to(dtype), 5, 3, 1e-2, 0.1) for dtype in (torch.float64, torch.float32))
    steps = 10
    for step in range(steps):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        weight.grad = gradient
        optimizer.step()
        flat = gradient.flatten(1)
        for reference in (truth, plain):
            reference.step(flat.T if turned else flat)
    found = weight.detach().flatten(1).double()
    error = ((found.T if turned else found) - truth.weight).abs().max()
    # As near as the plain form in fp32, whose coefficients are sums of as many products in another order; and the one
    # rounding a step that ours has more, of the update before it is added: at most lr times the sum of 5 columns.
    allowed = (plain.weight.double() - truth.weight).abs().max()
    assert error <= 2 * allowed + steps * 2.0**-24 * (1e-2 * 5 + tall.abs().max())


def test_states_of_staying_columns_go_on_and_of_new_ones_start_anew_in_low_bit_too() -> None:
    weight = nn.Parameter(torch.zeros(512, 300))
    optimizer = LowRankDCT([weight], AdamW8bit, rank=260, switch_every=1, lr=1e-2)
    for step in range(3):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        seat = optimizer._occupied[0]
        old = seat.extra["columns"].clone()
        optimizer.step()
        if step:
            inner = optimizer.inner
            slot = inner.slot(0, inner.param_groups[0], seat.stand_in, inner.state[seat.stand_in])
            moment = slot.decode(slot.specs[0])
            fresh = seat.extra["columns"] != old
            assert 0 < fresh.sum() < 100
            # one gradient's share in new columns, several gradients' in the others
            assert moment[:, fresh].std() < 0.11
            assert moment[:, ~fresh].std() > 0.12
    assert optimizer.state_bytes() <= 2.04 * 260 * 512 + 4 * 260 + 8


def test_memory_is_the_rank_times_the_longer_side() -> None:
    weight = nn.Parameter(torch.zeros(1000, 700))
    optimizer = LowRankDCT([weight], torch.optim.AdamW, rank=8)
    weight.grad = torch.randn(1000, 700)
    optimizer.step()
    assert optimizer.state_bytes() == 8 * 8 * 1000 + 4 * 8 + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize(
    ("base", "options"), [(AdamW8bit, {"param_rounding": "stochastic"}), (torch.optim.AdamW, {})], ids=str
)
def test_a_resumed_run_is_the_uninterrupted_one(base: Any, options: Any, at: int, dtype: torch.dtype) -> None:
    model = tiny(dtype)
    optimizer = LowRankDCT(model, base, rank=40, switch_every=3, lr=1e-2, **options)
    train(model, optimizer, range(at))
    up = next(seat.stand_in for seat in optimizer._occupied if seat.param is model.layers[0].up.weight)
    assert ("exp_avg_codes" in optimizer.inner.state[up]) == (base is AdamW8bit)  # the widest matrices' have 8 bits
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(model, optimizer, range(at, 8))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = tiny(dtype, seed=1)
    again.load_state_dict(saved["model"])
    other = LowRankDCT(again, base, rank=40, switch_every=9, lr=1.0, **options)
    other.load_state_dict(saved["optimizer"])
    assert train(again, other, range(at, 8)) == expected
    assert_same(values(again), values(model))


def test_training_with_a_third_of_the_columns_learns() -> None:
    model = tiny()
    losses = train(model, LowRankDCT(model, AdamW8bit, rank=24, switch_every=5, lr=3e-3), [0] * 60)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"switch_every": 1.5}, "switch_every is 1.5"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"side": "left"}, "'left'.*'auto'"),
    ],
)
def test_wrong_options_say_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankDCT(tiny(), AdamW8bit, **options)


@pytest.mark.parametrize("base", ["LAMB", "LARS", "Muon", "NorMuon", "AdamMini"])
def test_rules_over_whole_parameters_are_refused(base: str) -> None:
    with pytest.raises(ValueError, match=f"{base} looks at whole ones"):
        LowRankDCT(tiny(), getattr(memopt.optim, base), rank=8)


def test_a_state_dict_of_another_rank_is_refused() -> None:
    saved = LowRankDCT(tiny(), AdamW8bit, rank=8).state_dict()
    with pytest.raises(ValueError, match="of rank 8, this optimizer of rank 9"):
        LowRankDCT(tiny(), AdamW8bit, rank=9).load_state_dict(saved)
