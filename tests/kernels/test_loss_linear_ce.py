"""The vocabulary loss against the plain one: every argument, dtype and mode, one chunk and many."""

from __future__ import annotations

import pytest
import torch

from memopt.kernels.losses import dense_linear_cross_entropy, linear_cross_entropy
from memopt.kernels.losses.held_rows import HeldRows
from memopt.kernels.losses.problem import prepare
from memopt.kernels.losses.settings import Settings
from tests.kernels.loss_cases import Case, check_against_truth, error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CASES = {
    "plain": Case({}),
    "one_row": Case({}, shape=(1,), ignored=False),
    "no_batch": Case({"reduction": "sum"}, shape=(5,), ignored=False),
    "sum": Case({"reduction": "sum"}, bias=True),
    "none": Case({"reduction": "none"}),
    "nothing_ignored": Case({}, ignored=False, shape=(2, 3, 5)),
    "ignore_index": Case({"ignore_index": 0}),
    "smoothing": Case({"label_smoothing": 0.1}),
    "softcap": Case({"softcap": 4.0}),
    "scale": Case({}, scale=0.37),
    "z_loss": Case({"z_loss": 0.01}),
    "class_weight": Case({}, class_weight=True),
    "soft": Case({}, soft=True, ignored=False),
    "shift": Case({"shift": 1}),
    "shift_two_none": Case({"shift": 2, "reduction": "none"}, bias=True),
    "one_entry": Case({}, V=1, shape=(4,), ignored=False),
    "vocabulary_of_blocks": Case({}, V=1024, shape=(9,)),
    "ragged_block": Case({"softcap": 9.0}, V=1031, shape=(9,), bias=True),
    "all": Case(
        {"label_smoothing": 0.2, "z_loss": 0.02, "softcap": 6.0, "shift": 1}, bias=True, scale=1.3, class_weight=True
    ),
    "all_none": Case(
        {"label_smoothing": 0.2, "z_loss": 0.02, "softcap": 6.0, "reduction": "none"},
        bias=True,
        scale=1.3,
        class_weight=True,
    ),
    "all_soft": Case(
        {"label_smoothing": 0.3, "z_loss": 0.02, "softcap": 6.0, "shift": 1},
        bias=True,
        scale=1.3,
        class_weight=True,
        soft=True,
        ignored=False,
    ),
}
SMALL_CHUNK = 3 * 101 * 4  # a few rows, so that the last chunk is ragged


@pytest.mark.parametrize("mode", ["rows", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_one_chunk_matches_the_plain_loss(name: str, dtype: torch.dtype, mode: str) -> None:
    check_against_truth(CASES[name], dtype, mode=mode)


@pytest.mark.parametrize("mode", ["rows", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_many_chunks_match_the_plain_loss(name: str, dtype: torch.dtype, mode: str) -> None:
    check_against_truth(CASES[name], dtype, mode=mode, chunk_bytes=SMALL_CHUNK)


LARGE = {
    "plain": Case({}, shape=(600,), H=96, V=1000, ignored=False),
    "all": Case(
        {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 8.0, "reduction": "sum"},
        shape=(6, 100), H=96, V=1000, bias=True, scale=0.8, class_weight=True,
    ),
    "all_soft_none": Case(
        {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "none"},
        shape=(6, 100), H=96, V=1000, bias=True, scale=0.8, class_weight=True, soft=True, ignored=False,
    ),
    "half_ignored": Case({"shift": 1}, shape=(6, 100), H=96, V=1000, half_ignored=True),
}  # fmt: skip
# Bytes of scratch: all rows kept, in the gradient and in the scratch; some made again; ignored rows between too many
# to copy together; not even a narrow slice of all rows.
BUDGETS = {"kept": 1_190_000, "again": 400_000, "tight": 150_000, "blocks": 60_000}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("budget", BUDGETS)
def test_many_chunks_round_no_more_than_the_plain_loss(name: str, budget: str) -> None:
    check_against_truth(LARGE[name], torch.bfloat16, chunk_bytes=BUDGETS[budget])


@pytest.mark.parametrize("name", LARGE)
def test_the_same_in_other_modes(name: str) -> None:
    check_against_truth(LARGE[name], torch.float16, chunk_bytes=BUDGETS["again"])
    for budget in ("tight", "blocks"):
        check_against_truth(LARGE[name], torch.bfloat16, mode="recompute", chunk_bytes=BUDGETS[budget])


def test_what_the_budgets_mean() -> None:
    kept = {}
    for name, chunk_bytes in BUDGETS.items():
        case = LARGE["half_ignored" if name == "tight" else "plain"]
        hidden, weight, target = (case.tensors[n] for n in ("hidden", "weight", "target"))
        settings = Settings(chunk_bytes=chunk_bytes)
        flat = hidden.view(-1, 96).bfloat16()
        problem = prepare(flat, weight.bfloat16(), None, None, target.view(-1), None, settings)
        kept[name] = HeldRows(problem, 2 * 1000)
    assert (kept["kept"].again, kept["kept"].inside, kept["kept"].behind) == (0, 88, 512)
    assert kept["again"].again > 0 < kept["again"].behind
    assert kept["tight"].spread
    assert not kept["blocks"].fits


def test_many_chunks_give_bitwise_the_gradients_of_one() -> None:
    case = LARGE["plain"]
    one, many = (
        case.run(linear_cross_entropy, torch.bfloat16, torch.bfloat16, chunk_bytes=n) for n in (2**30, BUDGETS["kept"])
    )
    assert torch.equal(one["weight"], many["weight"])
    assert torch.equal(one["hidden"], many["hidden"])


@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_error_of_adding_in_bf16_grows_as_documented(chunks: int) -> None:
    """K partial sums are rounded, the k-th of size about sqrt(k / K): together sqrt((K + 1) / 2) roundings."""
    case = Case({}, shape=(512,), H=64, V=300, ignored=False)
    truth = case.run(dense_linear_cross_entropy, torch.bfloat16, torch.float64)["weight"]
    errors = {}
    for accumulate in ("once", "float32", "weight"):
        made = case.run(
            linear_cross_entropy, torch.bfloat16, torch.bfloat16, chunk_bytes=512 // chunks * 600, accumulate=accumulate
        )
        errors[accumulate] = error(made["weight"], truth)
    assert errors["float32"] == pytest.approx(errors["once"], rel=0.01)
    assert errors["once"] < errors["weight"] < 1.3 * errors["once"] * ((chunks + 1) / 2) ** 0.5


def test_loss_in_bf16_is_close_to_float64() -> None:
    case = Case({}, shape=(2048,), H=64, V=500, ignored=False)
    truth = case.run(dense_linear_cross_entropy, torch.bfloat16, torch.float64)["loss"]
    loss = case.run(linear_cross_entropy, torch.bfloat16, torch.bfloat16)["loss"]
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(truth)) < 1e-3
