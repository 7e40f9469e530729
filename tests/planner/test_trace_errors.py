"""Traces that fail say where, and leave the model as it was."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memopt.planner import TraceError, trace
from tests.planner.nets import GPT, ResNet

TOKENS = torch.zeros(2, 8, dtype=torch.long)


def snapshot(model: nn.Module) -> list[Any]:
    attributes = [{key: id(value) for key, value in module.__dict__.items()} for module in model.modules()]
    tensors = {name: (id(t), t.clone(), t._version) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return [attributes, tensors]


def assert_unchanged(model: nn.Module, before: list[Any]) -> None:
    after = snapshot(model)
    assert after[0] == before[0]
    for name, (identity, value, version) in before[1].items():
        assert after[1][name][0] == identity
        assert torch.equal(after[1][name][1], value)
        assert after[1][name][2] == version


class Cache(nn.Module):
    """Keeps tensors and counts outside parameters and buffers, as careless models do."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table = torch.ones(4)
        self.tables = [torch.ones(4), torch.ones(4)]
        self.seen: list[Tensor] = []
        self.calls, self.fails = 0, fails

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.linear(x) * self.table + self.tables[1]
        self.seen.append(y)
        self.last = y
        if self.fails:
            raise RuntimeError("on purpose")
        return y


@pytest.mark.parametrize("fails", [False, True])
def test_attributes_are_put_back(fails: bool) -> None:
    model = Cache(fails)
    before, rng = snapshot(model), torch.get_rng_state()
    if fails:
        with pytest.raises(TraceError, match="on purpose"):
            trace(model, torch.ones(2, 4))
    else:
        trace(model, torch.ones(2, 4))
    assert_unchanged(model, before)
    assert model.seen == []
    assert not hasattr(model, "last")
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.linear(torch.ones(2, 4)).sum().item() == model.linear(torch.ones(2, 4)).sum().item()


def test_a_trained_model_is_not_touched() -> None:
    model = ResNet()
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.ones(2, 3, 8, 8)
    model(images).sum().backward()
    optimizer.step()
    before = snapshot(model)
    gradients = [parameter.grad for parameter in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    trace(model, images, None, optimizer)
    assert_unchanged(model, before)
    assert all(a is b for a, b in zip(gradients, [p.grad for p in model.parameters()], strict=True))
    after = optimizer.state_dict()
    assert str(after) == str(state)


def test_no_hook_of_all_modules_stays() -> None:
    """torch.compile warns as long as torch thinks that there is one."""
    trace(nn.Linear(3, 3), (torch.zeros(2, 3),), lambda y: y.sum())
    assert not torch.nn.modules.module._has_any_global_hook()


def test_a_failing_module_is_named_with_its_shapes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(5, 4)))
    with pytest.raises(TraceError, match=r"module '1\.1' called with \(\(2, 4\) float32\)"):
        trace(model, torch.ones(2, 4))


def test_a_failing_loss_is_named() -> None:
    with pytest.raises(TraceError, match="the trace failed in"):
        trace(GPT(1, 16, 2, 20), TOKENS, lambda logits: logits @ torch.ones(3, 3))


def test_a_model_without_anything_to_differentiate_is_refused() -> None:
    model = nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(TraceError, match="requires one"):
        trace(model, torch.ones(2, 4))


def test_no_loss_is_said() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "nothing"

    with pytest.raises(TraceError, match="give loss_fn"):
        trace(Silent(), torch.ones(1))
    with pytest.raises(TraceError, match="loss_fn returned"):
        trace(nn.Linear(4, 4), torch.ones(1, 4), lambda y: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("model", torch.ones(1)), "model must be"), ((nn.Linear(1, 1), 3), "inputs must be")],
)
def test_arguments_of_other_types(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        trace(*arguments)


def test_accumulate_must_be_positive() -> None:
    with pytest.raises(ValueError, match="accumulate"):
        trace(nn.Linear(1, 1), torch.ones(1, 1), accumulate=0)


def test_a_lazy_module_is_named() -> None:
    with pytest.raises(TraceError, match=r"'0\.weight' has no shape yet"):
        trace(nn.Sequential(nn.LazyLinear(4)), torch.ones(1, 4))


def test_a_failing_trace_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TraceError):
        trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4)), torch.ones(2, 4))
    assert capfd.readouterr() == ("", "")


def test_a_scripted_module_is_refused_before_anything_is_touched() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(nn.Linear(4, 4), torch.zeros(2, 4), check_trace=False)
    with pytest.raises(TypeError, match="ScriptModule"):
        trace(scripted, (torch.zeros(2, 4),))


class Branching(nn.Module):
    def __init__(self, reads: bool = True) -> None:
        super().__init__()
        self.linear, self.reads = nn.Linear(4, 4), reads

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y * 2 if self.reads and y.sum() > 3 else y


def test_the_line_at_which_a_value_was_guessed_is_named() -> None:
    line = Branching.forward.__code__.co_firstlineno + 2
    assert trace(Branching(), (torch.zeros(2, 4),)).meta["guessed_at"] == f"test_trace_errors.py:{line}"
    assert "guessed_at" not in trace(Branching(reads=False), (torch.zeros(2, 4),)).meta
