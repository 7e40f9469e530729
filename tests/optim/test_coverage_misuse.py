"""Coverages: arguments of other kinds are named, state dicts of other kinds load nothing, copies and scalers work."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from memopt.optim import AdamW8bit, BlockCoordinate, LowRankDCT, Split
from tests.optim.coverage_models import assert_same, loss_of, tiny, train, values

KINDS: list[tuple[Any, dict[str, Any]]] = [
    (BlockCoordinate, {"switch_every": 2}),
    (BlockCoordinate, {"switch_every": 2, "order": "greedy"}),
    (Split, {"by": "columns", "switch_every": 2}),
    (Split, {"by": "blocks", "switch_every": 2}),
    (LowRankDCT, {"rank": 4, "switch_every": 2}),
]
_WRONG = {"sizes": "it has blocks of", "by": "it was split by", "rank": "it is of rank"}
EACH = pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)


@EACH
def test_copies_and_pickles_go_on_bitwise(kind: Any, options: dict[str, Any]) -> None:
    """In the middle of a visit, where a greedy one measures gradients."""
    model = tiny()
    optimizer = kind(model, "adamw8bit", lr=0.01, **options)
    train(model, optimizer, range(3))
    twins = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(model, optimizer, range(3, 7))
    for other, twin in twins:
        train(other, twin, range(3, 7))
        assert_same(values(other), values(model))


@EACH
def test_a_scaled_run_is_the_plain_one(kind: Any, options: dict[str, Any]) -> None:
    """A GradScaler divides the gradients of the block before the step; choices are made on those of backward."""
    found = []
    for enabled in (False, True):
        model = tiny()
        optimizer = kind(model, "adamw8bit", lr=0.01, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, enabled=enabled)
        for step in range(6):
            scaler.scale(loss_of(model, step)).backward()
            if enabled and step == 3:  # an overflow: the step is skipped and tried again
                next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                if options.get("order") == "greedy":
                    break  # the batch that is tried again counts twice in its measure
                scaler.scale(loss_of(model, step)).backward()
            elif options.get("order") == "greedy" and step == 3:
                break
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(values(model))
    assert_same(*found)


@EACH
def test_state_dicts_of_other_kinds_load_nothing(kind: Any, options: dict[str, Any]) -> None:
    model = tiny()
    optimizer = kind(model, "adamw8bit", lr=0.01, **options)
    train(model, optimizer, range(3))
    position, kept = optimizer.position, copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(kept)
    others = [
        (None, TypeError, "state_dict is a NoneType"),
        ([1], TypeError, "state_dict is a list"),
        ({}, ValueError, "needs 'state' and 'param_groups'"),
        ({**saved, "param_groups": 3}, ValueError, "no list of groups with 'params'"),
        ({**saved, "state": []}, ValueError, "no mapping of parameters"),
        (AdamW8bit(tiny().parameters()).state_dict(), ValueError, "expected a position of"),
    ]
    for base, message in (("adamw4bit", "its format is '4bit'"), ("lion8bit", "it is of rule 'lion'")):
        other = tiny()
        made = kind(other, base, lr=0.01, **options)
        train(other, made, range(3))
        others.append((made.state_dict(), ValueError, message))
    for wrong, error, message in others:
        with pytest.raises(error, match=message):
            optimizer.load_state_dict(wrong)
        assert optimizer.position == position
        for number, stored in optimizer.state_dict()["state"].items():
            assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(kept["state"][number][k]))
                       for k, v in stored.items())  # fmt: skip


@EACH
def test_positions_that_do_not_fit_change_nothing(kind: Any, options: dict[str, Any]) -> None:
    """Every key missing, and values of another kind or out of range: the optimizer goes on as its twin does."""
    model = tiny()
    optimizer = kind(model, "adamw8bit", lr=0.01, **options)
    train(model, optimizer, range(3))
    twin, plain = copy.deepcopy((model, optimizer))
    position, saved = json.loads(optimizer.position), copy.deepcopy(optimizer.state_dict())
    wrong = [({k: v for k, v in position.items() if k != key}, f"lacks {key}") for key in position if key != "of"]
    for key in position.keys() - {"of"}:
        least = -0.5 if key == "density" else -1
        above = {10**30} if key in ("visit", "since", "block", "start", "place", "density") else set()
        wrong += [({**position, key: v}, _WRONG.get(key, f"{key} is")) for v in (None, "a", 1.5, least, *above)]
    for changed, message in wrong:
        for group in saved["param_groups"]:
            group["coverage"] = json.dumps(changed)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
        with pytest.raises(ValueError, match=message):
            optimizer.seek(json.dumps(changed))
        assert json.loads(optimizer.position) == position
    train(model, optimizer, range(3, 6))
    train(twin, plain, range(3, 6))
    assert_same(values(model), values(twin))


@pytest.mark.parametrize(
    ("kind", "key", "values_", "message"),
    [
        (LowRankDCT, "columns", [0, 1, 2, 72], "are not 4 different ones of"),
        (LowRankDCT, "columns", [0, 1, 2, -1], "are not 4 different ones of"),
        (LowRankDCT, "columns", [0, 1, 2, 2], "are not 4 different ones of"),
        (LowRankDCT, "columns", [0, 1], "are not 4 different ones of"),
        (BlockCoordinate, "master", 0.5, r"master copy of parameter \d+ is of shape \(\), the parameter of"),
    ],
)
def test_what_a_coverage_keeps_is_checked(kind: Any, key: str, values_: Any, message: str) -> None:
    model = tiny(torch.bfloat16)
    optimizer = kind(model, "adamw8bit", lr=0.01, **({"rank": 4} if kind is LowRankDCT else {}))
    train(model, optimizer, range(2))
    saved, kept = (copy.deepcopy(optimizer.state_dict()) for _ in range(2))
    for stored in saved["state"].values():
        if key in stored:
            stored[key] = torch.tensor(values_)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    for found, wanted in zip(*(s["state"].values() for s in (optimizer.state_dict(), kept)), strict=True):
        assert_same(found, wanted)


def test_a_refused_state_dict_leaves_the_chosen_columns() -> None:
    """One of another visit, whose states are of another format: found after its columns were drawn."""
    model = tiny()
    optimizer = Split(model, "adamw8bit", lr=0.01, by="columns", switch_every=2)
    train(model, optimizer, range(3))
    twin, plain = copy.deepcopy((model, optimizer))
    other = tiny()
    later = Split(other, "adamw4bit", lr=0.01, by="columns", switch_every=2)
    train(other, later, range(5))
    with pytest.raises(ValueError, match="its format is '4bit'"):
        optimizer.load_state_dict(later.state_dict())
    train(model, optimizer, range(3, 6))
    train(twin, plain, range(3, 6))
    assert_same(values(model), values(twin))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        *((kind, {name: value}, f"^{name} is")
          for kind, names in (
              (BlockCoordinate, ("switch_every", "order", "start", "seed", "master", "process_group", "blocks")),
              (Split, ("density", "by", "switch_every", "rest", "rest_lr", "seed", "blocks")),
              (LowRankDCT, ("rank", "switch_every", "scale", "side")),
          )
          for name in names
          for value in ("a", 1.5j, [[]], -1)
          if (name, value) != ("scale", -1)),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_of_other_kinds_are_named(kind: Any, options: dict[str, Any], message: str) -> None:
    wanted = "^block" if options.get("blocks") == [[]] else message
    with pytest.raises((TypeError, ValueError), match=wanted):
        kind(tiny(), "adamw8bit", **options)


@pytest.mark.parametrize("kind", [BlockCoordinate, Split, LowRankDCT])
def test_models_and_bases_of_other_kinds_are_named(kind: Any) -> None:
    for model in (None, 5, "x", torch.zeros(3), [1, 2], tiny().state_dict()):
        with pytest.raises(TypeError, match=r"^model is a"):
            kind(model, "adamw8bit")
    for empty in ([], nn.ReLU()):
        with pytest.raises(ValueError, match="no parameter that requires gradients"):
            kind(empty, "adamw8bit")
    for base, error, message in (
        (None, TypeError, "^base is None"),
        (nn.Linear, TypeError, "^base is <class"),
        (AdamW8bit(tiny().parameters()), TypeError, "^base is an AdamW8bit, made already"),
        (lambda params, **options: 3, TypeError, "base made a int"),
        (torch.optim.LBFGS, ValueError, "base is LBFGS"),
        ("adamv", ValueError, "did you mean"),
    ):
        with pytest.raises(error, match=message):
            kind(tiny(), base)


@pytest.mark.parametrize("by", ["columns", "random"])
def test_parts_keep_the_settings_of_their_groups(by: str) -> None:
    model = tiny()
    params = list(model.parameters())
    frozen, free = params[:4], params[4:]
    groups = [{"params": frozen, "lr": 0.0}, {"params": free, "weight_decay": 0.5, "betas": (0.5, 0.9)}]
    optimizer = Split(groups, "adamw8bit", lr=0.01, by=by, density=0.3, switch_every=2, rest="sgd")
    before = [p.detach().clone() for p in frozen]
    train(model, optimizer, range(3))
    assert optimizer.inner is not None
    assert [(g["lr"], g["weight_decay"], g["betas"]) for g in optimizer.inner.param_groups] == [
        (0.0, 0.01, (0.9, 0.999)),
        (0.01, 0.5, (0.5, 0.9)),
    ]
    assert all(torch.equal(p, q) for p, q in zip(frozen, before, strict=True))


@EACH
def test_groups_cannot_be_added(kind: Any, options: dict[str, Any]) -> None:
    """They would never be trained, or never hold state."""
    optimizer = kind(tiny(), "adamw8bit", **options)
    with pytest.raises(ValueError, match=f"parameters of this {kind.__name__} are fixed; make a new one over all"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1


@EACH
def test_a_gradient_that_is_not_finite_calls_the_whole_step_off(kind: Any, options: dict[str, Any]) -> None:
    """Neither what holds state nor the rest moves, nor the cycle; both are counted, in the state dict too."""
    model = tiny()
    optimizer = kind(model, "adamw8bit", lr=0.01, skip_nonfinite=True, weight_decay=0.1, **options)
    train(model, optimizer, range(2))
    position, before = optimizer.position, values(model)
    for bad in (torch.nan, torch.inf):
        loss_of(model, 2).backward()
        [p for p in model.parameters() if p.grad is not None][-1].grad.view(-1)[0] = bad
        optimizer.step()
        optimizer.zero_grad()
    assert_same(values(model), before)
    assert json.loads(optimizer.position) == json.loads(position)
    assert optimizer.state_dict()["param_groups"][0]["skipped_steps"] == 2
    train(model, optimizer, range(2, 4))
    assert any(not torch.equal(value, before[name]) for name, value in values(model).items())


@EACH
def test_sparse_gradients_are_refused_before_anything_changes(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 70, sparse=True), nn.Linear(70, 80))
    if kind is BlockCoordinate or options.get("by") == "blocks":
        options = {**options, "blocks": [["0", "1"]]}
    optimizer = kind(model, "adamw8bit", lr=0.01, **options)
    before = values(model)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"got a sparse gradient for a parameter of shape \(20, 70\)"):
        optimizer.step()
    assert_same(values(model), before)


@EACH
def test_hooks_are_called_around_steps_and_state_dicts(kind: Any, options: dict[str, Any]) -> None:
    model = tiny()
    optimizer = kind(model, "adamw8bit", lr=0.01, **options)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "ours": 1})
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert seen == ["before", "after", "saving", "loading", "loaded"]
    assert saved["ours"] == 1
