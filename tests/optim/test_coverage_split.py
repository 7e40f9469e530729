"""Split: its two limits, a plain reference between them, and that a resumed run is the uninterrupted one."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memopt.optim import AdamW, AdamW8bit, Split
from memopt.optim.coverage import partial
from tests.optim.coverage_models import assert_same, loss_of, tiny, train, values

BASES: list[tuple[Any, dict[str, Any]]] = [
    (AdamW, {"state": "fp32"}),
    (AdamW8bit, {}),
    (torch.optim.AdamW, {}),
    (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
]
BY = ["blocks", "columns", "random"]


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize(("base", "options"), BASES, ids=str)
def test_density_one_is_the_base_optimizer_bitwise(base: Any, options: dict[str, Any], by: str) -> None:
    ours, plain = tiny(), tiny()
    split = Split(ours, base, density=1.0, by=by, lr=1e-2, switch_every=100, **options)
    losses = train(ours, split, range(5))
    assert losses == train(plain, base(plain.parameters(), lr=1e-2, **options), range(5))
    assert_same(values(ours), values(plain))


class StateFree(torch.optim.Optimizer):
    """signSGD or SGD with decoupled decay, in float64."""

    def __init__(self, params: Any, lr: float, decay: float, sign: bool) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "sign": sign})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad.double()
                direction = g.sign() if group["sign"] else g
                p.copy_(p.double() * (1 - group["lr"] * group["decay"]) - group["lr"] * direction)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("rest", ["sign", "sgd"])
def test_density_zero_is_the_update_without_state(by: str, rest: str) -> None:
    ours, plain = tiny(), tiny()
    split = Split(ours, AdamW8bit, density=0.0, by=by, rest=rest, rest_lr=0.5, lr=2e-2, weight_decay=0.1)
    train(ours, split, range(4))
    assert split.state_bytes() == 0
    reference = StateFree(plain.parameters(), 1e-2, 0.2, rest == "sign")
    train(plain, reference, range(4))
    for name, value in values(plain).items():
        torch.testing.assert_close(values(ours)[name], value, rtol=1e-6, atol=1e-7)


def test_without_decay_signs_move_every_element_by_the_same() -> None:
    """Exactly p - lr sign(g): powers of two leave no rounding."""
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 4.0]))
    split = Split([p], AdamW8bit, density=0.0, by="random", lr=0.25, weight_decay=0.0)
    p.grad = torch.tensor([3.0, -1e-30, 0.0, float("inf")])
    split.step()
    assert p.tolist() == [0.75, -1.75, 0.5, 3.75]


def masked_reference(model: nn.Module, chosen: dict[str, Tensor], lr: float, steps: range) -> None:
    """torch's AdamW on everything, but where not chosen the sign of the gradient instead."""
    base = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in steps:
        loss_of(model, step).backward()
        before = values(model)
        base.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                free = before[name] * (1 - lr * 0.01) - lr * p.grad.sign()
                p.copy_(torch.where(chosen[name], p, free))
        base.zero_grad()


@pytest.mark.parametrize("chunk", [1, 10_000, 1 << 30])
@pytest.mark.parametrize("by", ["columns", "random"])
def test_chosen_elements_follow_the_base_and_others_the_sign(
    by: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "CHUNK_BYTES", chunk)
    ours, plain = tiny(), tiny()
    split = Split(ours, torch.optim.AdamW, density=0.3, by=by, lr=1e-2)
    chosen = {}
    for index, (name, p) in enumerate(ours.named_parameters()):
        mask = torch.full_like(p, by == "columns" and p.ndim < 2, dtype=torch.bool)
        if index in split._chosen:
            rows = mask.view(-1) if by == "random" else mask.view(p.shape[0], -1)
            rows[..., split._chosen[index].long()] = True
        chosen[name] = mask
        assert abs(mask.double().mean() - 0.3) <= 0.5 / min(mask.numel(), 61) or p.ndim < 2
    train(ours, split, range(4))
    masked_reference(plain, chosen, 1e-2, range(4))
    for name, value in values(plain).items():
        torch.testing.assert_close(values(ours)[name], value, rtol=1e-5, atol=1e-6)


def test_blocks_take_turns_and_reach_the_share() -> None:
    model = tiny()
    split = Split(model, AdamW8bit, density=0.3, switch_every=2, lr=1e-3)
    total = sum(p.numel() for p in model.parameters())
    largest = max(block.numel for block in split.blocks)
    seen: list[set[str]] = []
    for step in range(20):
        held = {seat.index for seat in split._occupied}
        share = sum(seat.param.numel() for seat in split._occupied)
        assert abs(share - 0.3 * total) <= largest / 2
        names = {name for i, (name, _) in enumerate(model.named_parameters()) if i in held}
        if step % 2 == 0:
            seen.append(names)
        assert names == seen[-1]
        train(model, split, range(step, step + 1))
    assert set().union(*seen) == {name for name, _ in model.named_parameters()}
    assert Split(tiny(), AdamW8bit, density=0.001)._occupied  # a small share is one block


@pytest.mark.parametrize("by", ["columns", "random"])
def test_state_is_the_share_and_starts_empty_at_every_choice(by: str) -> None:
    model = nn.Linear(512, 256, bias=False)
    split = Split(model, AdamW8bit, density=0.25, by=by, switch_every=3, lr=1e-3)
    for step in range(7):
        before = {i: c.clone() for i, c in split._chosen.items()}
        model(torch.randn(2, 512)).square().sum().backward()
        split.step()
        split.zero_grad()
        if step % 3 == 2:
            assert split.state_bytes() == 0
            assert not torch.equal(before[0], split._chosen[0])
        else:
            assert split.state_bytes() <= 2.04 * 0.25 * model.weight.numel()
            assert torch.equal(before[0], split._chosen[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize(("base", "options"), [*BASES[1:3], (AdamW8bit, {"param_rounding": "stochastic"})], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(
    base: Any, options: dict[str, Any], by: str, at: int, dtype: torch.dtype
) -> None:
    model = tiny(dtype)
    split = Split(model, base, by=by, density=0.4, switch_every=3, lr=1e-2, seed=3, **options)
    train(model, split, range(at))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": split.state_dict()}, file)
    expected = train(model, split, range(at, 9))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = tiny(dtype, seed=1)
    again.load_state_dict(saved["model"])
    other = Split(again, base, by=by, density=0.1, switch_every=9, lr=1.0, **options)
    other.load_state_dict(saved["optimizer"])
    assert train(again, other, range(at, 9)) == expected
    assert_same(values(again), values(model))


def test_layouts_that_are_not_contiguous_are_kept() -> None:
    for by in ("columns", "random"):
        straight = nn.Parameter(torch.randn(6, 4, 3, 3))
        turned = nn.Parameter(straight.detach().clone().to(memory_format=torch.channels_last))
        for p in (straight, turned):
            split = Split([p], torch.optim.AdamW, by=by, density=0.5, lr=0.1)
            for step in range(3):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
                split.step()
        assert turned.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(straight, turned)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.5}, "density is 1.5"),
        ({"density": True}, "density is True"),
        ({"by": "rows"}, "'rows'.*'columns'"),
        ({"rest": "adam"}, "'adam'.*'sign'"),
        ({"rest_lr": -1}, "rest_lr is -1"),
        ({"switch_every": 0}, "switch_every is 0"),
        ({"blocks": "all"}, "blocks is 'all'"),
    ],
)
def test_wrong_options_say_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Split(tiny(), AdamW8bit, **options)


def test_rules_over_whole_parameters_are_refused_where_these_are_cut() -> None:
    matrix = nn.Linear(4, 4, bias=False)
    for by in ("columns", "random"):
        with pytest.raises(ValueError, match=f"by='{by}'.*Muon looks at whole ones"):
            Split(matrix, torch.optim.Muon, by=by)
    Split(matrix, torch.optim.Muon, by="blocks", density=1.0)


def test_a_state_dict_of_another_split_is_refused() -> None:
    model = tiny()
    saved = Split(model, AdamW8bit, by="columns").state_dict()
    for other, message in (
        (Split(tiny(), AdamW8bit, by="random"), "split by columns"),
        (Split(tiny(), AdamW8bit), "split by columns"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(saved)
