"""BlockCoordinate: its limits, what it keeps, and that a resumed run is the uninterrupted one."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memopt.optim import AdamW, AdamW8bit
from memopt.optim.coverage.block_coordinate import BlockCoordinate
from tests.optim.coverage_models import assert_same, loss_of, tiny, train, values

BASES = [
    (AdamW, {"state": "fp32"}),
    (AdamW8bit, {}),
    (torch.optim.AdamW, {}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (torch.optim.Adagrad, {}),
    ("adamw8bit", {}),
]
IDS = ["memopt fp32", "memopt 8bit", "torch AdamW", "torch SGD", "torch Adagrad", "by name"]


def everything(model: nn.Module) -> list[list[Tensor]]:
    return [list(model.parameters())]


@pytest.mark.parametrize(("base", "options"), BASES, ids=IDS)
def test_one_block_of_everything_is_the_base_optimizer_bitwise(base: Any, options: dict[str, Any]) -> None:
    ours, plain = tiny(), tiny()
    nested = BlockCoordinate(ours, base, blocks=everything(ours), switch_every=3, lr=1e-2, **options)
    factory = AdamW8bit if isinstance(base, str) else base
    losses = train(ours, nested, range(8))
    assert losses == train(plain, factory(plain.parameters(), lr=1e-2, **options), range(8))
    assert_same(values(ours), values(plain))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": 0.3, "lr": 3e-2}, {"params": others, "weight_decay": 0.0}]


def test_group_options_and_schedules_hold_over_switches() -> None:
    """Against a plain loop: per visit a fresh torch AdamW over the block, with the groups' options set by hand."""
    model, plain = tiny(), tiny()
    lists = [list(model.layers[i].parameters()) for i in range(3)]
    rest = [p for p in model.parameters() if all(p is not q for one in lists for q in one)]
    optimizer = BlockCoordinate(
        groups_of(model), torch.optim.AdamW, blocks=[*lists, rest], switch_every=2, order="ascending", lr=1e-2
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(model, optimizer, range(10), lambda step: schedule.step())
    twin = dict(zip(model.parameters(), plain.parameters(), strict=True))
    for step in range(10):
        block = {twin[p] for p in [*lists, rest][step // 2 % 4]}
        if step % 2 == 0:
            fresh = torch.optim.AdamW(
                [g for g in groups_of(plain) if g.update(params=[p for p in g["params"] if p in block]) or g["params"]],
                lr=1e-2,
            )
        for group in fresh.param_groups:
            group["lr"] = (3e-2 if group["weight_decay"] else 1e-2) * 0.9**step
        train(plain, fresh, range(step, step + 1))
        plain.zero_grad()
    for name, value in values(plain).items():
        torch.testing.assert_close(values(model)[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("base", "options"), BASES[:4], ids=IDS[:4])
@pytest.mark.parametrize(("order", "at"), [("random", 4), ("random", 5), ("greedy", 7), ("descending", 6)])
def test_a_resumed_run_is_the_uninterrupted_one(
    base: Any, options: dict[str, Any], dtype: torch.dtype, order: str, at: int
) -> None:
    def make(model: nn.Module) -> BlockCoordinate:
        return BlockCoordinate(model, base, switch_every=3, order=order, lr=1e-2, seed=5, **options)

    model = tiny(dtype, width=72)
    optimizer = make(model)
    train(model, optimizer, range(at))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(model, optimizer, range(at, 14))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = tiny(dtype, seed=1, width=72)
    again.load_state_dict(saved["model"])
    other = BlockCoordinate(again, base, switch_every=7, order="ascending", lr=1.0, **options)
    other.load_state_dict(saved["optimizer"])
    assert train(again, other, range(at, 14)) == expected
    assert_same(values(again), values(model))


def test_bf16_weights_are_trained_on_a_master_copy() -> None:
    """Updates far below a bf16 rounding step add up within a visit, as they do in fp32."""
    model, exact = tiny(torch.bfloat16), tiny(torch.bfloat16)
    optimizer = BlockCoordinate(model, torch.optim.SGD, blocks=everything(model), lr=1e-4)
    masters = {name: p.detach().float() for name, p in exact.named_parameters()}
    for step in range(40):
        train(model, optimizer, range(step, step + 1))
        exact.zero_grad()
        loss_of(exact, step).backward()
        with torch.no_grad():
            for name, p in exact.named_parameters():
                masters[name] -= 1e-4 * p.grad.float()
                p.copy_(masters[name])
    assert_same(values(model), values(exact))
    without = tiny(torch.bfloat16)
    train(
        without, BlockCoordinate(without, torch.optim.SGD, blocks=everything(without), lr=1e-4, master=False), range(40)
    )
    assert any(not torch.equal(a, b) for a, b in zip(without.parameters(), exact.parameters(), strict=True))


def test_state_bytes_are_those_of_the_block() -> None:
    model = tiny(torch.bfloat16)
    optimizer = BlockCoordinate(model, torch.optim.AdamW, order="fixed", start=1)
    train(model, optimizer, range(1))
    numel = optimizer.active_block.numel
    counters = 4 * len(optimizer.active_block.params)
    assert optimizer.state_bytes() == (4 + 8) * numel + counters


def test_copies_and_pickles() -> None:
    model = tiny()
    optimizer = BlockCoordinate(model, AdamW8bit, switch_every=2, lr=1e-2)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(model, optimizer, range(3))
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    expected = train(model, optimizer, range(3, 8))
    for twin, other in pairs:
        assert train(twin, other, range(3, 8)) == expected


def test_closures_hooks_and_frozen_parameters() -> None:
    model = tiny()
    model.embed.requires_grad_(False)
    optimizer = BlockCoordinate(model, torch.optim.SGD, switch_every=1, order="ascending", lr=0.1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(6)]
    assert losses == sorted(losses, reverse=True)
    assert calls == [1] * 6
    assert not model.embed.weight.requires_grad
    optimizer.restore()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["embed.weight"]


def test_a_step_skipped_by_the_gradient_scaler_does_not_move_the_cycle() -> None:
    model = tiny()
    optimizer = BlockCoordinate(model, torch.optim.SGD, switch_every=1, order="ascending", lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for spoil in (True, False):
        scaler.scale(loss_of(model, 0)).backward()
        if spoil:
            optimizer.active_block.params[0].grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.blocks.index(optimizer.active_block) == (0 if spoil else 1)


def test_accumulated_micro_batches_are_one_step() -> None:
    model, plain = tiny(), tiny()
    optimizer = BlockCoordinate(model, torch.optim.SGD, blocks=everything(model), lr=0.1)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    for one, two in ((model, optimizer), (plain, reference)):
        for micro in range(3):
            loss_of(one, micro).backward()
        two.step()
    assert_same(values(model), values(plain))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"switch_every": 0}, ValueError, "switch_every is 0"),
        ({"order": "upwards"}, ValueError, "'upwards'.*'random'"),
        ({"start": 5}, ValueError, "start is 5.*0 to 4"),
        ({"blocks": "all"}, ValueError, "blocks is 'all'"),
        ({"blocks": []}, ValueError, "blocks is empty"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ],
)
def test_wrong_options_say_what_is_wrong(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BlockCoordinate(tiny(), AdamW8bit, **options)


def test_wrong_models_and_bases_say_what_is_wrong() -> None:
    model = tiny()
    with pytest.raises(TypeError, match="base is"):
        BlockCoordinate(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="unknown optimizer 'adamw9bit'"):
        BlockCoordinate(model, "adamw9bit")
    with pytest.raises(ValueError, match="needs the module"):
        BlockCoordinate(model.parameters(), AdamW8bit)
    with pytest.raises(ValueError, match="no parameter that requires gradients"):
        BlockCoordinate(nn.Linear(1, 1).requires_grad_(False), AdamW8bit)
    with pytest.raises(TypeError, match=r"model is a Parameter"):
        BlockCoordinate(model.position, AdamW8bit)
    with pytest.raises(ValueError, match="parameters of this BlockCoordinate are fixed"):
        BlockCoordinate(model, AdamW8bit).add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_a_state_dict_that_does_not_fit_changes_nothing() -> None:
    model = tiny()
    optimizer = BlockCoordinate(model, AdamW8bit, switch_every=4, order="ascending", lr=1e-2)
    train(model, optimizer, range(2))
    fine = optimizer.state_dict()
    other = tiny(layers=2)
    fewer = BlockCoordinate(other, AdamW8bit, lr=1e-2).state_dict()
    coarse = BlockCoordinate(tiny(), AdamW8bit, blocks=[["layers", "embed"], ["position", "norm", "head"]])
    lion = copy.deepcopy(fine)
    lion["param_groups"][0]["state"] = "4bit"
    lost = copy.deepcopy(fine)
    lost["state"] = {}
    for wrong, message in (
        (fewer, "groups of .* parameters"),
        (coarse.state_dict(), "blocks of"),
        (torch.optim.AdamW(tiny().parameters()).state_dict(), "position of BlockCoordinate"),
        (lion, "4bit"),
        (lost, "middle of a visit"),
        ({"state": {}}, "param_groups"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(wrong)
    twin = tiny()
    twin.load_state_dict(model.state_dict())
    clean = BlockCoordinate(twin, AdamW8bit, lr=1.0)
    clean.load_state_dict(fine)
    assert train(model, optimizer, range(2, 9)) == train(twin, clean, range(2, 9))
