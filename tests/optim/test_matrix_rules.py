"""Muon, NorMuon and Adam-mini: which parameters take which step, and how a model is cut into blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memopt.optim import AdamMini, AdamW, Muon, NorMuon
from memopt.optim.orthogonal import orthogonalise
from tests.optim.training import gradients, largest_difference, parameters, run


def test_muon_follows_torchs_own() -> None:
    shapes = [(64, 96), (97, 31)]
    ours, theirs, start = parameters(shapes), parameters(shapes), parameters(shapes)
    run(Muon(ours, lr=0.02, state="fp32"), 5)
    run(torch.optim.Muon(theirs, lr=0.02), 5)
    moved = max(float((p - q).detach().abs().max()) for p, q in zip(theirs, start, strict=True))
    assert largest_difference(ours, theirs) <= moved * 2.0**-6  # two roundings of bf16, whose half spacing is 2**-9


@pytest.mark.parametrize("rule", [Muon, NorMuon])
def test_other_parameters_take_adamw(rule: type) -> None:
    shapes = [(64, 96), (8,), (4, 3, 2), ()]
    ours, theirs = parameters(shapes), parameters(shapes)
    run(rule(ours, lr=0.02, adamw_lr=0.01, weight_decay=0.1, state="fp32"), 4)
    run(AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, state="fp32"), 4)
    assert largest_difference(ours[1:], theirs[1:]) == 0
    assert largest_difference(ours[:1], theirs[:1]) > 1e-3


def test_a_group_of_matrices_can_ask_for_adamw() -> None:
    ours, theirs = parameters([(64, 96)]), parameters([(64, 96)])
    run(Muon([{"params": ours, "use_muon": False}], lr=0.02, state="8bit"), 3)
    run(AdamW(theirs, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1, state="8bit"), 3)
    assert largest_difference(ours, theirs) == 0
    with pytest.raises(ValueError, match=r"use_muon=True with a parameter of shape \(8,\)"):
        Muon(parameters([(8,)]), use_muon=True)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (1, 7), (20, 20)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100
    values = torch.linalg.svdvals(orthogonalise(matrix).float())
    assert values.min() > 0.5 or shape == (20, 20)  # a square random matrix has singular values near 0
    assert values.max() < 1.3
    assert orthogonalise(torch.zeros(shape)).abs().max() == 0


class Attention(nn.Module):
    """Grouped-query attention with a head size of its own and names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = 4, 2, 8
        self.a = nn.Linear(24, 32)
        self.b = nn.Linear(24, 16, bias=False)
        self.c = nn.Linear(24, 16, bias=False)
        self.d = nn.Linear(32, 24)


class Model(nn.Module):
    """An embedding, one attention of each kind, a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 24)
        self.attention = Attention()
        self.other = nn.MultiheadAttention(24, 3)
        self.up = nn.Linear(24, 48)
        self.norm = nn.LayerNorm(24)


def test_blocks_come_from_structure() -> None:
    model = Model()
    optimizer = AdamMini(model, state="fp32")
    rows = {
        name: group["rows_per_block"]
        for group in optimizer.param_groups
        for name in group["param_names"]
        if group["rows_per_block"] is not None
    }
    assert rows == {
        "attention.a.weight": 8,
        "attention.a.bias": 8,
        "attention.b.weight": 8,
        "other.in_proj_weight": 8,
        "other.in_proj_bias": 8,
    }
    gradients(list(model.parameters()), 0)
    optimizer.step()
    counts = {name: optimizer.state[p]["block_avg_sq"].numel() for name, p in model.named_parameters()}
    assert counts["tokens.weight"] == 50
    assert (counts["attention.a.weight"], counts["attention.b.weight"], counts["attention.c.weight"]) == (4, 2, 16)
    assert (counts["up.weight"], counts["up.bias"], counts["norm.weight"]) == (48, 1, 1)


def test_rows_per_block_must_divide() -> None:
    with pytest.raises(ValueError, match=r"rows_per_block is 7, which does not divide a parameter of shape \(64, 9\)"):
        AdamMini(parameters([(64, 9)]), rows_per_block=7)


def test_one_block_per_element_is_adamw() -> None:
    """The limit of the paper's section 2.3: blocks of one element give Adam back."""
    ours, theirs = parameters([(64, 1)]), parameters([(64, 1)])
    run(AdamMini(ours, lr=0.01, state="fp32"), 5)
    run(AdamW(theirs, lr=0.01, state="fp32"), 5)
    assert largest_difference(ours, theirs) <= 5 * 2.0**-22
