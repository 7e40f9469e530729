"""Losses of one's own over a fused model's logits: the ways to write one that need no logits, and those that do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memopt
from tests.closeness import InDouble, check_as_exact, check_losses_as_exact
from tests.integrations.causal_models import CHUNK_BYTES, LABELS, TOKENS, B, NoLogits, T, V, build, gradients, logits_of

NEXT = LABELS[:, 1:]


class MeanSquare(torch.autograd.Function):
    """An operation in C++, as torch sees it: no ``__torch_function__`` asks the logits first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x * x).mean()

    @staticmethod
    def backward(ctx: Any, of_mean: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return of_mean * 2 * x / x.numel()


def shifted(model: nn.Module) -> Tensor:
    logits = logits_of(model)[..., :-1, :].contiguous()
    return F.cross_entropy(logits.view(-1, V), NEXT.contiguous().view(-1))


def masked(model: nn.Module) -> Tensor:
    counted = NEXT != -100
    return F.cross_entropy(logits_of(model)[:, :-1][counted], NEXT[counted], reduction="sum") / 7


def weighted(model: nn.Module) -> Tensor:
    loss = nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.linspace(1, 2, V))
    return loss(logits_of(model)[:, :-1].reshape(-1, V).to(torch.float32), NEXT.reshape(-1))


def scaled(model: nn.Module) -> Tensor:
    hidden = model.model(input_ids=TOKENS).last_hidden_state
    logits = ((0.5 * model.lm_head(hidden) + torch.linspace(0, 1, V)) * torch.tensor(1.5)) / 2
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), NEXT.flatten())


def first_entries(model: nn.Module) -> Tensor:
    return F.cross_entropy(logits_of(model)[:, :-1, :500].flatten(0, 1), NEXT.clamp_max(499).flatten())


def items(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, labels=LABELS, num_items_in_batch=torch.tensor(17)).loss


def kept(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, labels=LABELS[:, -5:], logits_to_keep=5).loss


def tuples(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, labels=LABELS, return_dict=False)[0]


def checkpointed(model: nn.Module) -> Tensor:
    new = hasattr(model, "activation_checkpointing_enable")  # its name since transformers 5.23
    getattr(model, "activation_checkpointing_enable" if new else "gradient_checkpointing_enable")()
    loss = model(input_ids=TOKENS, labels=LABELS, use_cache=False).loss
    getattr(model, "activation_checkpointing_disable" if new else "gradient_checkpointing_disable")()
    return loss


def probabilities(model: nn.Module) -> Tensor:
    target = torch.linspace(-3, 3, B * T * V).reshape(-1, V).softmax(-1)
    return F.cross_entropy(logits_of(model).flatten(0, 1), target)


def gathered(model: nn.Module) -> Tensor:
    chosen = logits_of(model).float()[:, :-1].log_softmax(-1).gather(-1, NEXT.clamp_min(0).unsqueeze(-1))
    return -chosen.mean()


def loss_and_logits(model: nn.Module) -> Tensor:
    output = model(input_ids=TOKENS, labels=LABELS)
    return output.loss + 0.1 * output.logits.square().mean()


def below_python(model: nn.Module) -> Tensor:
    return MeanSquare.apply(logits_of(model)[:, :-1])


def overwritten(model: nn.Module) -> Tensor:
    logits = logits_of(model)
    logits[..., :7] = -3.0
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), NEXT.flatten())


def watched(model: nn.Module) -> Tensor:
    logits = logits_of(model)
    logits.register_hook(lambda gradient: 2 * gradient)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), NEXT.flatten())


def transposed(model: nn.Module) -> Tensor:
    return F.cross_entropy(logits_of(model)[:, :-1].transpose(1, 2), NEXT)


WITHOUT_LOGITS = [shifted, masked, weighted, scaled, first_entries, items, kept, tuples, checkpointed]

WITH_LOGITS = [probabilities, gathered, loss_and_logits, below_python, overwritten, watched, transposed]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("gemma2 softcap")


def results(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """The loss, and the gradient of every parameter."""
    loss = run(model)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def exactly(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """The same in float64."""
    exact = copy.deepcopy(model).double()
    with InDouble():
        return results(exact, run)


@pytest.mark.parametrize("way", [*WITHOUT_LOGITS, *WITH_LOGITS], ids=lambda way: way.__name__)
def test_any_loss_has_the_stock_model_s_value_and_gradients(
    model: nn.Module, way: Callable[[nn.Module], Tensor]
) -> None:
    # What checkpoints run again in backward is out of reach of the mode that makes float64 of it.
    plain, truth = results(model, way), exactly(model, tuples if way is checkpointed else way)
    guard = NoLogits() if way in WITHOUT_LOGITS else nullcontext()
    with memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES), guard:
        found = results(model, way)
    assert found["loss"].dtype == plain["loss"].dtype
    # Matrix products of four rows add up 1024 terms one by one, of all rows in blocks: where probabilities and targets
    # nearly cancel, gradients of the hidden states show three times the rounding (measured, of the product alone).
    check_as_exact(found, plain, truth, luck=4)


def loss_of_float_logits(output: Any) -> Tensor:
    return F.cross_entropy(output.logits.float()[:, :-1].flatten(0, 1), NEXT.flatten())


@pytest.mark.parametrize("loss_inside", [True, False])
def test_autocast(model: nn.Module, loss_inside: bool) -> None:
    def run(module: nn.Module) -> Tensor:
        double = module.lm_head.weight.dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16, enabled=not double):
            output = module(input_ids=TOKENS, labels=LABELS)
        assert output.logits.dtype == (torch.float64 if double else torch.bfloat16)
        loss: Tensor = output.loss if loss_inside else loss_of_float_logits(output)
        return loss

    plain, truth = results(model, run), exactly(model, run)
    with memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES), NoLogits():
        found = results(model, run)
    assert found["loss"].dtype == plain["loss"].dtype == torch.float32
    # The stock model rounds its logits to bfloat16 and may be lucky in the one number that its loss is.
    eps = torch.finfo(torch.bfloat16).eps
    check_losses_as_exact([found.pop("loss")], [plain.pop("loss")], [truth.pop("loss")], eps)
    check_as_exact(found, plain, truth)
