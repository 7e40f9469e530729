"""Every rule against torch's own optimizer, or against the paper's formula, both also run in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import memopt.optim as room
from tests.optim import references as ref
from tests.optim.training import SHAPES, gradients, largest_difference, parameters, run

STEPS = 7


@dataclass(frozen=True)
class Case:
    """One of our optimizers and what must give the same values."""

    ours: str
    options: dict[str, Any]
    theirs: Callable[[list[Tensor]], torch.optim.Optimizer]
    shapes: tuple[tuple[int, ...], ...] = field(default=SHAPES)

    def __str__(self) -> str:
        return "-".join([self.ours, *(f"{k}={v}" for k, v in self.options.items())])


def torchs(name: str, **options: Any) -> Case:
    """Our optimizer has torch's name and options."""
    theirs = dict(options)
    return Case(name, options, lambda params: getattr(torch.optim, name)(params, **theirs))


def papers(name: str, rule: ref.Step, reference: dict[str, Any], **options: Any) -> Case:
    """Our optimizer must follow a formula of ``references``."""
    return Case(name, options, lambda params: ref.Reference(params, rule, **reference))


BETAS = {"lr": 0.01, "betas": (0.9, 0.99)}
CASES = [
    torchs("Adam", lr=0.01),
    torchs("Adam", lr=0.01, weight_decay=0.1, maximize=True),
    torchs("Adam", lr=0.01, weight_decay=0.1, amsgrad=True),
    torchs("Adam", lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    torchs("AdamW", lr=0.01, weight_decay=0.1, amsgrad=True, maximize=True),
    torchs("SGD", lr=0.01),
    torchs("SGD", lr=0.01, weight_decay=0.5, maximize=True),
    torchs("SGD", lr=0.01, momentum=0.9, dampening=0.5),
    torchs("SGD", lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    torchs("RMSprop", lr=0.01),
    torchs("RMSprop", lr=0.01, weight_decay=0.1, momentum=0.9, maximize=True),
    torchs("RMSprop", lr=0.01, weight_decay=0.1, centered=True),
    torchs("RMSprop", lr=0.01, centered=True, momentum=0.1),
    torchs("Adagrad", lr=0.1),
    torchs("Adagrad", lr=0.1, lr_decay=0.5, weight_decay=0.1, initial_accumulator_value=0.1),
    papers("Lion", ref.lion, {**BETAS, "weight_decay": 0.1}, **BETAS, weight_decay=0.1),
    papers("LAMB", ref.lamb, {**BETAS, "eps": 1e-6, "weight_decay": 0.1}, **BETAS, weight_decay=0.1),
    papers(
        "LARS",
        ref.lars,
        {"lr": 10.0, "momentum": 0.9, "weight_decay": 0.1, "trust": 1e-2},
        lr=10.0,
        weight_decay=0.1,
        trust=1e-2,
    ),
    papers(
        "AdEMAMix",
        ref.ademamix,
        {"lr": 0.01, "betas": (0.9, 0.99, 0.999), "alpha": 5.0, "warmup": None, "eps": 1e-8},
        lr=0.01,
        betas=(0.9, 0.99, 0.999),
    ),
    papers(
        "AdEMAMix",
        ref.ademamix,
        {"lr": 0.01, "betas": (0.9, 0.99, 0.999), "alpha": 5.0, "warmup": 5, "eps": 1e-8},
        lr=0.01,
        betas=(0.9, 0.99, 0.999),
        t_alpha=5,
        t_beta3=5,
    ),
]

MATRICES = ((64, 96), (97, 31), (40, 40))
for _name, _formula, _more in (
    ("Muon", ref.muon, {"lr": 0.02}),
    ("Muon", ref.muon, {"lr": 0.02, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
    ("NorMuon", ref.normuon, {"lr": 0.02}),
):
    CASES.append(Case(_name, _more, lambda p, f=_formula, o=_more: ref.Reference(p, f, **o), MATRICES))
for _rows in (None, 0, 8):
    _more = {"lr": 0.01, "betas": (0.9, 0.99), "rows_per_block": _rows}
    CASES.append(
        Case(
            "AdamMini",
            _more,
            lambda p, o=_more: ref.Reference(p, ref.adam_mini, **o),
            ((64, 300), (32, 16, 3, 3), (8,)),
        )
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32_rule_is_as_near_to_float64_as_the_plain_implementation(case: Case) -> None:
    ours, theirs = parameters(case.shapes), parameters(case.shapes)
    truth = [torch.nn.Parameter(p.detach().double()) for p in ours]
    run(getattr(room, case.ours)(ours, state="fp32", **case.options), STEPS)
    run(case.theirs(theirs), STEPS)
    exact = case.theirs(truth)
    for step in range(STEPS):
        gradients(theirs, step)
        for p, q in zip(truth, theirs, strict=True):
            p.grad = q.grad.double()
        exact.step()
    # The slack: one rounding a step, of values up to 8 (half a spacing is 2**-22).
    assert largest_difference(ours, truth) <= 2 * largest_difference(theirs, truth) + STEPS * 2.0**-22
    assert largest_difference(ours, parameters(case.shapes)) > 1e-3  # it moved


LOW_BIT = {
    "bf16": (2.0, 2.0),
    "8bit": (1.0, 1.02),
    "8bit-dynamic": (1.0, 1.02),
    "4bit": (0.5, 0.535),
    "4bit-paper": (0.5, 0.535),
}
STATES = {
    "Adam": 2, "AdamW": 2, "Lion": 1, "SGD": 1, "RMSprop": 1, "Adagrad": 1, "LAMB": 2, "LARS": 1, "AdEMAMix": 3,
    "AdamMini": 1, "Muon": 1, "NorMuon": 1,
}  # fmt: skip
NEEDED = {"SGD": {"momentum": 0.9}}


@pytest.mark.parametrize("state", LOW_BIT)
@pytest.mark.parametrize("name", STATES)
def test_bytes_per_parameter(name: str, state: str) -> None:
    params = parameters([(64, 300), (97, 101), (256, 129), *([(5001,)] if "Muon" not in name else [])])
    optimizer = getattr(room, name)(params, state=state, **NEEDED.get(name, {}))
    run(optimizer, 1)
    rows = sum(p.shape[0] if p.dim() > 1 else 1 for p in params) * 4  # the moments of Adam-mini and NorMuon
    held = optimizer.state_bytes() - (rows if name in ("AdamMini", "NorMuon") else 0)
    per_state = held / sum(p.numel() for p in params) / STATES[name]
    low, high = LOW_BIT[state]
    assert low <= per_state <= high


@pytest.mark.parametrize("state", ["bf16", "8bit", "4bit"])
@pytest.mark.parametrize("name", STATES)
def test_low_bit_states_go_where_fp32_goes(name: str, state: str) -> None:
    """The summed path after 30 steps points where fp32's does: the cosine between them, one for all parameters."""
    shapes = [(64, 300), (97, 101)]
    start = parameters(shapes)
    moved = []
    for kept in ("fp32", state):
        params = parameters(shapes)
        run(getattr(room, name)(params, state=kept, **NEEDED.get(name, {})), 30)
        moved.append(torch.cat([(p - q).detach().flatten() for p, q in zip(params, start, strict=True)]))
    cosine = float(torch.nn.functional.cosine_similarity(moved[0], moved[1], dim=0))
    assert cosine > {"bf16": 0.999, "8bit": 0.99, "4bit": 0.85}[state]
