"""The vocabulary loss against the plain one: every argument, dtype and mode, one chunk and many."""

from __future__ import annotations

import pytest
import torch

from memopt.kernels.losses import dense_linear_cross_entropy, linear_cross_entropy
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


@pytest.mark.parametrize("name", CASES)
def test_many_chunks_in_bf16_with_float32_accumulation(name: str) -> None:
    check_against_truth(CASES[name], torch.bfloat16, chunk_bytes=SMALL_CHUNK, accumulate="float32")


@pytest.mark.parametrize("chunks", [2, 4, 8, 32])
def test_error_of_accumulating_in_bf16_grows_as_documented(chunks: int) -> None:
    """K partial sums are rounded, the k-th of size about sqrt(k / K): together sqrt((K + 1) / 2) roundings."""
    case = Case({}, shape=(256,), H=64, V=300, ignored=False)
    truth = case.run(dense_linear_cross_entropy, torch.bfloat16, torch.float64)["weight"]
    one = error(case.run(linear_cross_entropy, torch.bfloat16, torch.bfloat16)["weight"], truth)
    rows = 256 // chunks
    many = error(
        case.run(linear_cross_entropy, torch.bfloat16, torch.bfloat16, chunk_bytes=rows * 600)["weight"], truth
    )
    assert one < many < 1.3 * one * ((chunks + 1) / 2) ** 0.5


def test_loss_in_bf16_is_close_to_float64() -> None:
    case = Case({}, shape=(2048,), H=64, V=500, ignored=False)
    truth = case.run(dense_linear_cross_entropy, torch.bfloat16, torch.float64)["loss"]
    loss = case.run(linear_cross_entropy, torch.bfloat16, torch.bfloat16)["loss"]
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(truth)) < 1e-3
