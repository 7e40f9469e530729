"""``memopt.fuse_loss`` on transformers' causal language models: the stock model's loss and gradients, no logits."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

import memopt
from memopt.integrations.lazy_logits import LazyLogits
from tests.integrations.causal_models import ARCHITECTURES, CHUNK_BYTES, LABELS, TOKENS, NoLogits, build, gradients


def error(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error of every gradient, in the Euclidean norm."""
    return {n: ((found[n].double() - t).norm() / t.norm()).item() for n, t in truth.items() if t.norm() > 0}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_as_exact_as_the_stock_model_s(name: str) -> None:
    stock = build(name)
    exact = copy.deepcopy(stock).double()
    logits = exact(input_ids=TOKENS).logits
    assert logits.dtype == torch.float64
    true_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
    true_loss.backward()
    truth = gradients(exact)
    for dtype in (torch.float32, torch.bfloat16):
        model = stock.to(dtype)
        plain = model(input_ids=TOKENS, labels=LABELS)
        plain.loss.backward()
        expected = gradients(model)
        with memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES), NoLogits():
            fused = model(input_ids=TOKENS, labels=LABELS)
            fused.loss.backward()
        found = gradients(model)
        assert fused.loss.dtype == plain.loss.dtype
        # Backward from the loss both models round at the same places, so their errors are of one size: twice for luck.
        eps = torch.finfo(dtype).eps
        allowed = 1.25 * abs(plain.loss.item() - true_loss.item()) + 4 * eps * true_loss.item()
        assert abs(fused.loss.item() - true_loss.item()) <= allowed
        assert found.keys() == expected.keys()
        usual, own = error(expected, truth), error(found, truth)
        assert {n: e for n, e in own.items() if e > 2 * usual[n] + 2 * eps} == {}
        assert torch.equal(fused.logits, plain.logits)
        assert type(model(input_ids=TOKENS).logits) is torch.Tensor


def test_every_gradient_there_is_comes_through() -> None:
    """The comparison above would pass for a model whose head alone got gradients."""
    model = build("llama")
    memopt.fuse_loss(model)
    model(input_ids=TOKENS, labels=LABELS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_guard_sees_stock_logits() -> None:
    with pytest.raises(AssertionError, match="all logits"), NoLogits():
        build("llama")(input_ids=TOKENS, labels=LABELS)


def test_logits_that_are_asked_for_are_the_stock_model_s() -> None:
    model = build("gemma2 softcap")
    expected = model(input_ids=TOKENS).logits
    memopt.fuse_loss(model)
    output = model(input_ids=TOKENS, labels=LABELS)
    logits = output.logits
    assert isinstance(logits, LazyLogits)
    assert (logits.shape, logits.dtype, logits.device) == (expected.shape, expected.dtype, expected.device)
    assert logits.requires_grad
    assert not logits.is_computed
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert logits.is_computed
    assert logits.tolist() == expected.tolist()


def test_nothing_of_a_step_outlives_it() -> None:
    model = build("gemma2 softcap")
    memopt.fuse_loss(model)
    gc.collect()
    gc.disable()
    try:
        output = model(input_ids=TOKENS, labels=LABELS)
        held = weakref.ref(output.logits)
        output.loss.backward()
        del output
        assert held() is None  # no cycle keeps the hidden states until the collector comes by
    finally:
        gc.enable()
