"""The traced peak is the metered peak, and every category of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memopt
from memopt.optim import AdamW8bit, make, release_gradients
from memopt.planner import Trace, trace
from tests.planner import nets

TOKENS = torch.arange(4 * 64).reshape(4, 64) % 200
IMAGES = torch.linspace(-1, 1, 4 * 3 * 32 * 32).reshape(4, 3, 32, 32)
LABELS = torch.arange(4)
SEQUENCES = torch.linspace(-1, 1, 2 * 16 * 32).reshape(2, 16, 32)

Loss = Callable[[Any], Tensor]


def language_loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), TOKENS.flatten())


def class_loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, LABELS)


def squares(output: Tensor) -> Tensor:
    return output.square().mean()


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], Loss | None]] = {
    "gpt with its loss inside": (nets.GPT, (TOKENS, TOKENS), None),
    "gpt with tied embeddings": (lambda: nets.GPT(tied=True), (TOKENS,), language_loss),
    "gpt with dropout": (lambda: nets.GPT(dropout=0.1), (TOKENS,), language_loss),
    "gpt in bfloat16": (lambda: nets.GPT(dtype=torch.bfloat16), (TOKENS,), language_loss),
    "vit": (nets.ViT, (IMAGES,), class_loss),
    "resnet": (nets.ResNet, (IMAGES,), class_loss),
    "u-net": (nets.UNet, (IMAGES,), squares),
    "state space": (lambda: nn.Sequential(nets.StateSpace(), nets.StateSpace()), (SEQUENCES,), squares),
    "mixture of experts": (nets.MixtureOfExperts, (TOKENS,), language_loss),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
}


def at_peak(traced: Trace) -> dict[str, int]:
    """Bytes by category where the traced step peaks, added up the slow way."""
    best: Counter[str] = Counter()
    for time in sorted({storage.birth for storage in traced.storages}):
        live: Counter[str] = Counter()
        for storage in traced.storages:
            if storage.birth <= time < storage.death:
                live[storage.category.value] += storage.bytes
        if live.total() > best.total():
            best = live
    return dict(best)


def metered(
    model: nn.Module, inputs: tuple[Tensor, ...], loss_fn: Loss | None, optimizer: Any
) -> memopt.metering.Meter:
    def step() -> None:
        optimizer.zero_grad()
        output = model(*inputs)
        loss = output if loss_fn is None else loss_fn(output)
        loss.backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    with memopt.meter(model, optimizer) as found:
        step()
    optimizer.zero_grad()
    return found


@pytest.mark.parametrize(
    ("case", "optimizer_name"), [*((case, "AdamW") for case in CASES), ("resnet", "SGD with momentum")]
)
def test_traced_and_metered_peaks_agree(case: str, optimizer_name: str) -> None:
    make, inputs, loss_fn = CASES[case]
    model = make()
    fresh = OPTIMIZERS[optimizer_name](model.parameters())
    traced = trace(model, inputs, loss_fn, fresh)
    found = metered(model, inputs, loss_fn, fresh)
    assert traced.peak_bytes == pytest.approx(found.peak_bytes, rel=0.01)
    assert sum(at_peak(traced).values()) == traced.peak_bytes
    for name, size in found.by_category.items():
        assert at_peak(traced).get(name, 0) == pytest.approx(size, rel=0.02, abs=0.01 * found.peak_bytes), name


@pytest.mark.parametrize("name", ["muon", "normuon8bit", "adammini", "lamb"])
def test_what_a_step_makes_beside_its_kernel_is_traced(name: str) -> None:
    torch.manual_seed(0)
    model, tokens = nets.GPT(layers=1, width=256), TOKENS[:1, :8]  # the step is the peak
    optimizer = make(name, model.named_parameters())
    traced = trace(model, (tokens, tokens), None, optimizer)
    found = metered(model, (tokens, tokens), None, optimizer)
    assert traced.peak_bytes == pytest.approx(found.peak_bytes, rel=0.02)


def test_a_trace_with_state_equals_one_without() -> None:
    model = nets.GPT()
    optimizer = torch.optim.AdamW(model.parameters())
    before = trace(model, (TOKENS, TOKENS), None, optimizer)
    model(TOKENS, TOKENS).backward()
    optimizer.step()
    assert trace(model, (TOKENS, TOKENS), None, optimizer) == before


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_models_without_weights_trace_alike(device: str) -> None:
    real = nets.GPT(tied=True)
    with torch.device(device):
        model = nets.GPT(tied=True)
        tokens = torch.zeros(4, 64, dtype=torch.long)
    traced = trace(model, {"tokens": tokens, "targets": tokens})
    assert traced == trace(real, (tokens.to("cpu").zero_() if device == "cpu" else torch.zeros_like(TOKENS),) * 2)


def test_without_an_optimizer_there_is_no_step() -> None:
    traced = trace(nets.GPT(), (TOKENS, TOKENS))
    assert {op.phase.value for op in traced.ops} == {"forward", "loss", "backward"}


def test_accumulating_gradients_costs_their_bytes_at_the_peak() -> None:
    model = nets.GPT()
    once = trace(model, (TOKENS, TOKENS), None, torch.optim.SGD(model.parameters()))
    twice = trace(model, (TOKENS, TOKENS), None, torch.optim.SGD(model.parameters()), accumulate=2)
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    assert twice.peak_bytes - once.peak_bytes == pytest.approx(gradients, rel=0.01)


def test_several_losses_are_added() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    traced = trace(model, torch.ones(4, 8), lambda y: {"mean": y.mean(), "square": (y * y).mean()})
    assert any(op.name.startswith("aten.add") and op.phase.value == "loss" for op in traced.ops)


def test_frozen_parameters_have_no_gradients_and_no_state() -> None:
    model = nets.GPT()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("blocks.2"))
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    traced = trace(model, (TOKENS, TOKENS), None, optimizer)
    found = metered(model, (TOKENS, TOKENS), None, optimizer)
    totals: Counter[str] = Counter()
    for storage in traced.storages:
        totals[storage.category.value] += storage.bytes
    assert totals["gradients"] == trained
    assert trained * 2 <= totals["optimizer_state"] <= trained * 2 + 1000
    assert traced.peak_bytes == pytest.approx(found.peak_bytes, rel=0.01)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_are_traced_as_they_run(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inward, self.layers = nn.Linear(32, 32), nn.ModuleList(nets.Layer(32, 4) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.inward(x)
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return x

    model, inputs = Checkpointed(), (torch.ones(4, 32, 32),)
    optimizer = torch.optim.AdamW(model.parameters())
    traced = trace(model, inputs, squares, optimizer)
    found = metered(model, inputs, squares, optimizer)
    assert traced.peak_bytes == pytest.approx(found.peak_bytes, rel=0.01)


def test_autocast() -> None:
    model = nets.GPT(vocabulary=2000)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(TOKENS)
            loss = language_loss(logits)
        loss.backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    with memopt.meter(model, optimizer) as found:
        step()
    traced = trace(model, (TOKENS,), language_loss, optimizer, autocast=torch.bfloat16)
    assert traced.peak_bytes == pytest.approx(found.peak_bytes, rel=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert trace(model, (TOKENS,), language_loss, optimizer).peak_bytes == traced.peak_bytes


class Adapter(nn.Module):
    """A frozen linear layer with a trained low-rank one beside it, as PEFT wraps them."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_low_rank_adapters() -> None:
    model = nets.GPT()
    model.requires_grad_(False)
    for block in model.blocks:
        block.attention.qkv = Adapter(block.attention.qkv)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    traced = trace(model, (TOKENS, TOKENS), None, optimizer)
    found = metered(model, (TOKENS, TOKENS), None, optimizer)
    assert traced.peak_bytes == pytest.approx(found.peak_bytes, rel=0.01)
    assert traced.meta["trainable_parameters"] == sum(parameter.numel() for parameter in trained)
    assert len(traced.blocks) == 3


def test_unused_parameters_have_no_state() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, inputs = Half(), (torch.ones(2, 64),)
    optimizer = torch.optim.AdamW(model.parameters())
    traced = trace(model, inputs, squares, optimizer)
    found = metered(model, inputs, squares, optimizer)
    assert traced.peak_bytes == pytest.approx(found.peak_bytes, rel=0.001)
    assert at_peak(traced)["optimizer_state"] == found.by_category["optimizer_state"]


def test_gradients_that_are_released_in_backward() -> None:
    model, inputs = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)]), (torch.ones(2, 256),)
    optimizer = AdamW8bit(model.parameters(), lr=1e-3)
    plain = trace(model, inputs, squares, optimizer)
    with release_gradients(optimizer):
        traced = trace(model, inputs, squares, optimizer)
        found = metered(model, inputs, squares, optimizer)
    assert traced.peak_bytes == pytest.approx(found.peak_bytes, rel=0.01)
    assert traced.peak_bytes < plain.peak_bytes - 3 * 256 * 256 * 4
