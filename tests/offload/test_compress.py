"""Compressed storages come back within their format's error, masks bit for bit, and never feed a replay."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memopt.kernels import get_codec
from memopt.offload import apply
from memopt.offload.formats import format_named
from memopt.planner.values import Action, StorageAction
from tests.offload.models import CASES, Case, make_plan, mixture, run, same, step_loss, templates
from tests.offload.prepared import EXACT, prepared

SIZES = (1, 7, 64, 255, 256, 257, 3000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_codes_are_within_half_a_level_of_the_block(name: str, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(size).to(dtype)
    format = format_named(name)
    decode = format.encode(x, 0, False)
    assert decode is not None
    codec = get_codec(format.codec)
    levels = codec.values().double().sort().values
    half = (levels[1:] - levels[:-1]).max() / 2
    blocks = F.pad(x.double(), (0, -size % format.block)).view(-1, format.block)
    # On top of the format's error: rounding of the scale's product to float32, and of the result to its own type.
    rounding = 2.0**-20 + torch.finfo(dtype).eps
    bound = blocks.abs().amax(1, keepdim=True) * (half + rounding)
    error = (F.pad(decode().double(), (0, -size % format.block)).view(-1, format.block) - blocks).abs()
    assert (error <= bound).all()
    assert decode().dtype == dtype


@pytest.mark.parametrize("size", [1, 8, 9, 1000, 2**20 + 3])
@pytest.mark.parametrize("kind", ["dropout", "bool", "zeros", "byte"])
def test_masks_come_back_bit_for_bit(kind: str, size: int) -> None:
    mask = torch.rand(size) < 0.7
    x = {
        "dropout": mask / 0.7,
        "bool": mask,
        "zeros": torch.zeros(size, dtype=torch.bfloat16),
        "byte": mask.to(torch.uint8) * 3,
    }[kind]
    decode = format_named("mask").encode(x, 0, False)
    assert decode is not None
    assert torch.equal(decode(), x)
    assert decode().dtype == x.dtype


def test_what_is_no_mask_is_refused() -> None:
    for x in (torch.tensor([0.0, 1.0, 2.0]), torch.tensor([-1.0, 0.0]), torch.tensor([float("nan"), 0.0])):
        assert format_named("mask").encode(x, 0, False) is None
    assert format_named("8bit").encode(torch.arange(5), 0, False) is None


def test_projection_is_unbiased() -> None:
    """The mean of N sketches has variance |x|^2 / (rank N) per element; 5 standard deviations for each of 640."""
    x = torch.randn(10, 64)
    count, rank = 4000, 8
    mean = torch.zeros_like(x)
    for _ in range(count):
        decode = format_named("projection").encode(x.view(-1), 64, False)
        assert decode is not None
        mean += decode().view_as(x) / count
    # Var[(x P P^T)_j] = (|x|^2 + x_j^2) / rank
    deviation = ((x.square().sum(1, keepdim=True) + x.square()) / (rank * count)).sqrt()
    assert ((mean - x).abs() <= 5 * deviation).all()


def _with_format(actions, format: str):
    return {
        key: tuple(
            StorageAction(a.index, a.bytes, a.action, 1.0, format if a.action is Action.COMPRESS else None)
            for a in some
        )
        for key, some in actions.items()
    }


@pytest.mark.parametrize("name", ["gpt", "gpt-autocast", "resnet", "views"])
@pytest.mark.parametrize("format", ["8bit", "4bit"])
def test_gradients_stay_close(name: str, format: str) -> None:
    case, model, start, batches, _, found = prepared(name, 1)

    def gradients() -> list[torch.Tensor]:
        model.load_state_dict(start)
        model.zero_grad()
        torch.manual_seed(3)
        loss = step_loss(case, model, batches[0])
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    plain = gradients()
    with apply(model, make_plan(case, _with_format(mixture(found, 0, (Action.COMPRESS,)), format))) as handle:
        ours = gradients()
        assert handle.counts.whole == 0
    assert torch.equal(ours[0], plain[0])
    total = torch.cat([g.flatten() for g in plain[1:]]).norm()
    error = torch.cat([(a - b).flatten() for a, b in zip(ours[1:], plain[1:], strict=True)]).norm()
    # Each saved value is off by a relative error e of about 1 % (8 bits) or 10 % (4 bits); a gradient is a sum of
    # products of at most 3 of them per layer, through at most 3 layers.
    assert error / total < {"8bit": 0.01, "4bit": 0.1}[format] * 9
    assert error > 0


@pytest.mark.parametrize("name", ["gpt", "views", "resnet"])
def test_masks_change_nothing(name: str) -> None:
    case, model, _, batches, expected, found = prepared(name)
    plan = make_plan(case, _with_format(mixture(found, 0, (Action.COMPRESS,)), "mask"))
    with apply(model, plan):
        assert same(run(case, model, batches), expected)


def test_compressed_values_never_feed_a_replay() -> None:
    """Exact actions elsewhere give exact results even where what is compressed lies on the replay's way."""

    class Chain(nn.Module):
        def forward(self, x):
            a = x.sin()  # cos needs x; the next op saves a
            b = a.exp()  # saves its own output b
            return b.sin()  # saves b

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(64))
            self.block = Chain()

        def forward(self, x):
            return self.block(x * self.scale).sum()

    case = Case(Model, lambda g: (torch.randn(3, 64, generator=g),), ("block",))
    model = Model()
    x = torch.randn(3, 64)
    found = templates(case, model, (x,))
    (template,) = found.values()
    assert len(template.saved) == 1
    plain = torch.autograd.grad(model(x), model.scale)[0]
    with apply(model, make_plan(case, mixture(found, 0, (Action.RECOMPUTE,)))):
        assert torch.equal(torch.autograd.grad(model(x), model.scale)[0], plain)


def test_mixtures_with_masks_and_exact_actions() -> None:
    case, model, start, batches, expected, found = prepared("gpt")
    for seed in range(6):
        model.load_state_dict(start)
        actions = _with_format(mixture(found, seed, (*EXACT, Action.COMPRESS)), "mask")
        with apply(model, make_plan(case, actions)) as handle:
            assert same(run(case, model, batches), expected), seed
            assert handle.counts.whole == 0, handle.counts.reasons


def test_the_sign_of_a_relu_is_enough_for_its_backward() -> None:
    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 64)

        def forward(self, x):
            return F.relu(self.inner(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Tail()

        def forward(self, x):
            return (self.block(x) + 1).sum()

    case = Case(Model, lambda g: (torch.randn(5, 32, generator=g),), ("block",))
    model, x = Model(), torch.randn(5, 32)
    plan = make_plan(case, _with_format(mixture(templates(case, model, (x,)), 0, (Action.COMPRESS,)), "mask"))
    plain = torch.autograd.grad(model(x), list(model.parameters()))
    with apply(model, plan) as handle:
        for _ in range(3):
            assert same(list(torch.autograd.grad(model(x), list(model.parameters()))), list(plain))
        compiled = next(iter(handle.blocks[0]._variants[0].values()))[0]
        assert compiled.template.signs_only


def test_unknown_format_is_refused() -> None:
    case = CASES["gpt"]
    model = case.make()
    actions = {("blocks.0", 0): (StorageAction(0, 0, Action.COMPRESS, 1.0, "zip"),)}
    with pytest.raises(ValueError, match=r"'zip' is unknown; choose one of 8bit, 4bit, mask, projection"):
        apply(model, make_plan(case, actions))
    assert "forward" not in model.blocks[0].__dict__
