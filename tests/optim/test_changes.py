"""What users change under a running optimizer, and what they put around it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import memopt.optim as room
from memopt.optim import SGD, AdamW, AdamW8bit, BlockCoordinate, Lion, make
from tests.optim.coverage_models import loss_of, tiny
from tests.optim.every_rule import RULES, made
from tests.optim.training import (
    assert_same_state,
    copies,
    gradients,
    largest_difference,
    parameters,
    run,
    through_file,
)

SHAPES = [(70, 80), (9,)]


@pytest.mark.parametrize("rule", RULES)
def test_a_model_may_change_its_type(rule: str) -> None:
    """States stay as they are: steps after ``model.bfloat16()`` are those of a run whose states were loaded."""
    params = parameters(SHAPES)
    optimizer = made(rule, params)
    run(optimizer, 2)
    for p in params:
        p.data = p.data.bfloat16()
        p.grad = None
    loaded = copies(params)
    other = made(rule, loaded)
    other.load_state_dict(optimizer.state_dict())
    run(optimizer, [2, 3])
    run(other, [2, 3])
    assert_same_state(optimizer, other)
    assert largest_difference(params, loaded) == 0
    for p in params:
        p.data = p.data.double()
        p.grad = None
    gradients(params, 4)
    before = copies(params)
    kept = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"parameter 0 is of torch.float64; .* 32 or 16 bits"):
        optimizer.step()
    assert largest_difference(params, before) == 0
    for number, stored in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, kept["state"][number][name]) for name, value in stored.items())


def test_compensations_come_and_go_with_the_type() -> None:
    params = parameters([(70, 80)])
    optimizer = AdamW8bit(params, param_rounding="kahan")
    found = []
    for step, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float32)):
        params[0].data, params[0].grad = params[0].data.to(dtype), None
        run(optimizer, [step])
        found.append(getattr(optimizer.state[params[0]].get("compensation"), "dtype", None))
    assert found == [None, torch.bfloat16, torch.float16, None]
    AdamW8bit(copies(params), param_rounding="kahan").load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("rule", "before", "after", "added"),
    [
        (AdamW, {}, {"amsgrad": True}, "max_exp_avg_sq_codes"),
        (SGD, {"lr": 0.1}, {"momentum": 0.9}, "momentum_buffer_codes"),
    ],
)
def test_states_that_an_option_asks_for_later_start_then(rule: Any, before: Any, after: Any, added: str) -> None:
    params = parameters(SHAPES)
    optimizer = rule(params, **before)
    run(optimizer, 2)
    optimizer.param_groups[0].update(after)
    run(optimizer, [2])
    assert added in optimizer.state[params[0]]
    assert optimizer.state[params[0]]["step"] == 3


SWITCHED = [
    ("SGD", {"lr": 0.1}, "momentum", (0.9, 0.0, 0.8)),
    ("SGD", {"lr": 0.1, "dampening": 0.5}, "momentum", (0.0, 0.9, 0.0)),
    ("RMSprop", {}, "momentum", (0.5, 0.0, 0.9)),
    ("RMSprop", {}, "centered", (True, False, True)),
    ("AdamW", {}, "amsgrad", (True, False, True)),
    ("Adam", {}, "amsgrad", (True, False, True)),
    ("LARS", {}, "momentum", (0.9, 0.0, 0.9)),
]


@pytest.mark.parametrize(
    ("rule", "options", "name", "values", "state"),
    [
        (*case, state)
        for case in SWITCHED
        for state in ("fp32", "8bit")
        if state == "fp32" or "centered" not in case  # its mean of gradients needs 32 bits
    ],
)
def test_states_of_options_switched_off_wait_as_torchs_do(
    rule: str, options: Any, name: str, values: Any, state: str
) -> None:
    """Two steps under each value: torch's values in fp32, and bitwise those of a run saved and loaded in between."""
    kinds = [(getattr(room, rule), {"state": state})] * 2
    if state == "fp32" and rule != "LARS":
        kinds.append((getattr(torch.optim, rule), {}))
    found = []
    for kind, more in kinds:
        params = parameters(SHAPES)
        optimizer = kind(params, **{name: values[0]}, **options, **more)
        for turn, value in enumerate(values):
            optimizer.param_groups[0][name] = value
            if len(found) == 1 and turn:
                loaded = kind(params, **options, **more)
                loaded.load_state_dict(through_file(optimizer.state_dict()))
                optimizer = loaded
            run(optimizer, [2 * turn, 2 * turn + 1])
        found.append(params)
    assert largest_difference(found[0], found[1]) == 0
    if len(found) == 3:
        moved = largest_difference(found[2], parameters(SHAPES))
        assert largest_difference(found[0], found[2]) <= 2e-6 + 1e-5 * moved  # what torch's suite allows its own


def test_a_changed_format_or_shape_is_refused_before_anything_changes() -> None:
    params = parameters(SHAPES)
    optimizer = AdamW8bit(params)
    run(optimizer, 1)
    before = copies(params)
    optimizer.param_groups[0]["state"] = "fp32"
    gradients(params, 1)
    with pytest.raises(ValueError, match=r"parameter 0 .*has exp_avg_codes, which is not how 'fp32' keeps .*convert"):
        optimizer.step()
    assert largest_difference(params, before) == 0
    assert optimizer.state[params[1]]["step"] == 1


def test_frozen_parameters_wait_and_parameters_are_listed_once() -> None:
    params = parameters([(70, 80), (70, 80)])
    params[1].requires_grad_(False)
    optimizer = AdamW8bit(params)
    params[0].sum().backward()
    optimizer.step()
    assert [len(optimizer.state[p]) for p in params] == [5, 0]
    with pytest.raises(ValueError, match="params holds a parameter twice"):
        AdamW8bit([params[0], params[0]])
    with pytest.raises(ValueError, match="more than one parameter group"):
        AdamW8bit([{"params": params}, {"params": params[:1]}])


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (None, TypeError, "params is a NoneType; it must be an iterable"),
        (set(parameters(SHAPES)), TypeError, "params is a set; .*order"),
        ([{"lr": 0.1}], TypeError, "must be a dict with 'params'"),
        (["weight"], TypeError, "one of the params is str"),
        ([torch.zeros(3, requires_grad=True) * 2], ValueError, "non-leaf"),
        ([torch.zeros(3, dtype=torch.float64)], ValueError, r"params\[0\] is of torch.float64; AdamW takes"),
        ([torch.zeros(3).to(torch.float8_e4m3fn)], ValueError, "float8_e4m3fn"),
        ([torch.zeros(3, dtype=torch.int64)], ValueError, "int64"),
    ],
    ids=str,
)
def test_parameters_of_other_kinds_are_refused(params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdamW(params)


def test_groups_and_state_dicts_of_other_kinds_are_refused() -> None:
    optimizer = AdamW(parameters(SHAPES))
    for wrong in ([1, 2], {"lr": 0.1}, None):
        with pytest.raises(TypeError, match="must be a dict with 'params'"):
            optimizer.add_param_group(wrong)
    with pytest.raises(TypeError, match="params is a set"):
        optimizer.add_param_group({"params": set(parameters(SHAPES))})
    for wrong in (None, [1], "x"):
        with pytest.raises(TypeError, match=r"state_dict is a .*; it must be what an optimizer's returned"):
            optimizer.load_state_dict(wrong)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("value", [10**400, "1", None, 1 + 2j, torch.tensor(-1.0), [0.1]])
@pytest.mark.parametrize("rule", RULES)
def test_learning_rates_of_other_kinds_are_refused_by_name(rule: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^lr is"):
        made(rule, parameters([(3, 3)]), lr=value)


def compiled_steps(optimizer: Any, model: nn.Module, whole: bool) -> list[torch.Tensor]:
    def train(step: int) -> None:
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it does not trace
        run_one = torch.compile(train, backend="eager") if whole else train
        for step in range(3):
            run_one(step)
    return list(model.parameters())


@pytest.mark.parametrize("kind", ["adamw8bit", "block coordinate"])
def test_a_compiled_training_step_is_the_plain_one(kind: str) -> None:
    """The step runs between the graphs: nothing of it is traced, and the values are the same."""
    found = []
    for whole in (False, True):
        model = tiny()
        if kind == "adamw8bit":
            optimizer: Any = make(kind, model.parameters(), lr=torch.tensor(0.01))
        else:
            optimizer = BlockCoordinate(model, AdamW8bit, switch_every=1, order="ascending", lr=0.01)
        found.append(compiled_steps(optimizer, model, whole))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_averaged_models_clipping_and_inference_mode() -> None:
    torch.manual_seed(0)
    model = nn.Linear(80, 80)
    optimizer = Lion(model.parameters(), lr=1e-2)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    seen = []
    for foreach in (True, False):
        model(torch.ones(4, 80)).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=foreach)
        with torch.inference_mode():
            optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        schedule.step()
        seen.append(model.weight.detach().clone())
    assert torch.equal(averaged.module.weight, (seen[0] + (seen[1] - seen[0]) / 2))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
