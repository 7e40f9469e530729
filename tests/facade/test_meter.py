"""``memopt.meter``: measured peaks by category."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memopt
from tests.planner.nets import GPT

TOKENS = torch.zeros(4, 32, dtype=torch.long)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    logits = model(TOKENS)
    F.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()).backward()
    optimizer.step()


def test_the_categories_add_up_to_the_peak() -> None:
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters())
    one_step(model, optimizer)
    optimizer.zero_grad()
    with memopt.meter(model, optimizer) as m:
        one_step(model, optimizer)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert sum(m.by_category.values()) == m.peak_bytes
    assert m.by_category["weights"] == weights
    assert m.by_category["optimizer_state"] == pytest.approx(2 * weights, rel=0.01)
    assert m.by_category["activations"] > 0
    assert m.by_category["logits_and_loss"] > 0
    assert m.peak_by_category["gradients"] == weights
    assert m.device == "cpu"
    assert m.allocator == {} or torch.cuda.is_available()
    assert m.peak_resident_bytes > m.peak_bytes


def test_the_timeline_has_every_operation() -> None:
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters())
    with memopt.meter(model, optimizer) as m:
        assert m.timeline == []
        one_step(model, optimizer)
    assert max(sample.live_bytes for sample in m.timeline) == m.peak_bytes
    assert [sample.index for sample in m.timeline] == list(range(len(m.timeline)))
    assert {sample.phase for sample in m.timeline} == {"forward", "loss", "backward", "optimizer"}
    seconds = [sample.seconds for sample in m.timeline]
    assert seconds == sorted(seconds)
    assert all(sum(sample.by_category.values()) == sample.live_bytes for sample in m.timeline)


def test_without_arguments_weights_and_state_are_found() -> None:
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters())
    one_step(model, optimizer)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    with memopt.meter() as m:
        pass
    assert m.by_category["weights"] >= weights
    assert m.by_category["gradients"] >= weights
    assert m.by_category["optimizer_state"] >= 2 * weights


def test_several_steps_peak_like_one() -> None:
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters())
    one_step(model, optimizer)
    with memopt.meter(model, optimizer) as once:
        one_step(model, optimizer)
    with memopt.meter(model, optimizer) as thrice:
        for _ in range(3):
            one_step(model, optimizer)
    assert thrice.peak_bytes == once.peak_bytes
    assert thrice.by_category == once.by_category


def test_measuring_changes_nothing() -> None:
    def train(measured: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model = GPT(dropout=0.2)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            if measured:
                with memopt.meter(model, optimizer):
                    one_step(model, optimizer)
            else:
                one_step(model, optimizer)
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


def test_saved_tensor_hooks_of_others_still_fire() -> None:
    model, packed = GPT(), []
    with memopt.meter(model), torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t, lambda t: t):
        model(TOKENS, TOKENS).backward()
    assert packed


def test_gradients_freed_inside_backward_are_gradients() -> None:
    model = GPT()

    def release(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(release)
    with memopt.meter(model) as m:
        model(TOKENS, TOKENS).backward()
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert largest <= m.peak_by_category["gradients"] < sum(parameter.nbytes for parameter in model.parameters())


def test_memopt_optimizers_are_measured() -> None:
    from memopt.optim import AdamW

    model = GPT(vocabulary=1024)
    optimizer = AdamW(model.parameters(), state="8bit")
    one_step(model, optimizer)
    optimizer.zero_grad()
    traced = memopt.trace(model, TOKENS, lambda y: F.cross_entropy(y.flatten(0, 1), TOKENS.flatten()), optimizer)
    with memopt.meter(model, optimizer) as m:
        one_step(model, optimizer)
    assert m.by_category["optimizer_state"] == optimizer.state_bytes()
    assert traced.peak_bytes == pytest.approx(m.peak_bytes, rel=0.01)


def test_an_error_passes_through_and_leaves_no_hooks() -> None:
    with pytest.raises(RuntimeError, match="mine"), memopt.meter():
        raise RuntimeError("mine")
    assert not nn.modules.module._global_forward_hooks


def test_a_meter_measures_once() -> None:
    m = memopt.meter(nn.Linear(2, 2))
    with m:
        pass
    with pytest.raises(ValueError, match="measured already"), m:
        pass


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="model must be a Module"):
        memopt.meter(model="gpt")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be a Optimizer"):
        memopt.meter(optimizer=nn.Linear(1, 1))  # type: ignore[arg-type]


def test_the_chunked_loss_is_predicted_and_measured_alike() -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.layer = nn.Embedding(3000, 64), nn.Linear(64, 64)
            self.head = nn.Linear(64, 3000, bias=False)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden = F.gelu(self.layer(self.token(tokens)))
            return memopt.linear_cross_entropy(hidden, self.head.weight, tokens, chunk_bytes=2**18)

    model = Headed()
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss = model(TOKENS)
        loss.backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    with memopt.meter(model, optimizer) as m:
        step()
    assert memopt.trace(model, TOKENS, None, optimizer).peak_bytes == m.peak_bytes
    whole = 4 * TOKENS.numel() * 3000
    assert 2**17 < m.peak_by_category["logits_and_loss"] < whole


def test_what_a_runtime_brings_back_is_an_activation() -> None:
    from memopt.planner.tracking import restoring

    def unpack(shape: torch.Size) -> torch.Tensor:
        with restoring():
            return torch.ones(shape)

    model = GPT()
    with memopt.meter(model) as m, torch.autograd.graph.saved_tensors_hooks(lambda t: t.shape, unpack):
        loss = (model.head.weight * torch.ones_like(model.head.weight).requires_grad_()).sum()
        loss.backward()
    back = [sample for sample in m.timeline if sample.phase == "backward"]
    assert max(sample.by_category["activations"] for sample in back) >= 2 * model.head.weight.nbytes


def test_a_model_under_a_plan_is_traced_without_it() -> None:
    model = GPT(layers=4)
    plain = memopt.trace(model, (TOKENS, TOKENS))
    plan = memopt.plan(plain, budget=plain.peak_bytes * 3 // 4, hardware="cpu")
    with memopt.apply(model, plan):
        assert memopt.trace(model, (TOKENS, TOKENS)).peak_bytes == plain.peak_bytes
        model(TOKENS, TOKENS).backward()
        model.zero_grad()
        with memopt.meter(model) as m:
            model(TOKENS, TOKENS).backward()
    assert m.peak_bytes == pytest.approx(plan.peak_bytes, rel=0.01)
