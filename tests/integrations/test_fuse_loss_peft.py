"""A fused model under PEFT: adapters in the body, on the head, a trained copy of the head; wrapped before or after."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import memopt
from memopt.integrations.lazy_logits import LazyLogits
from tests.closeness import InDouble, check_as_exact, check_losses_as_exact
from tests.integrations.causal_models import CHUNK_BYTES, LABELS, TOKENS, NoLogits, build, exact_loss, gradients

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks the old name

CASES: dict[str, dict[str, Any]] = {
    "body": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head with dropout": {"target_modules": ["lm_head"], "lora_dropout": 0.2},
    "trained copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
}


def adapted(model: Any, case: str) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False, **CASES[case])
    return peft.get_peft_model(model, config).train()


def step(model: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The output, and the loss and every gradient."""
    torch.manual_seed(2)  # of the adapters' dropout
    output = model(input_ids=TOKENS, labels=LABELS)
    output.loss.backward()
    return output, {"loss": output.loss.detach(), **gradients(model)}


def with_logits(output: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"logits": torch.as_tensor(output.logits.detach()) + 0, **values}


@pytest.mark.parametrize("fused_first", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_adapters_get_the_stock_model_s_gradients(case: str, fused_first: bool) -> None:
    stock = adapted(build("llama"), case)
    expected = with_logits(*step(stock))
    exact = copy.deepcopy(stock).double()
    with InDouble():
        truth = with_logits(*step(exact))
    base = build("llama")
    if fused_first:
        memopt.fuse_loss(base, chunk_bytes=CHUNK_BYTES)
    model = adapted(base, case)
    memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES)
    with nullcontext() if case == "dora" else NoLogits():
        output, found = step(model)
    check_as_exact(with_logits(output, found), expected, truth)


def loss(model: Any) -> float:
    return model(input_ids=TOKENS, labels=LABELS).loss.item()


def switched(model: Any, guard: Any) -> list[float]:
    """The loss with adapters of the head and without them, then the same once they are merged into the weight."""
    with guard:
        losses = [loss(model)]
        with model.disable_adapter():
            losses.append(loss(model))
    model.merge_adapter()
    losses.append(loss(model))
    with model.disable_adapter():  # takes the merge back
        return [*losses, loss(model)]


def test_adapters_of_the_head_can_be_switched_off_and_merged() -> None:
    stock, model = (adapted(build("llama"), "head") for _ in range(2))
    exact = copy.deepcopy(stock).double()
    with InDouble():
        truth = switched(exact, nullcontext())
    memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES)
    check_losses_as_exact(switched(model, NoLogits()), switched(stock, nullcontext()), truth)
    assert abs(truth[1] / truth[0] - 1) > 1e4 * torch.finfo(torch.float32).eps  # the adapters do something


def test_taking_the_adapters_off_leaves_a_fused_model() -> None:
    stock, model = (adapted(build("llama"), "head") for _ in range(2))
    truth = exact_loss(stock)
    memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES)
    merged = model.merge_and_unload()
    with torch.no_grad(), NoLogits():
        output = merged(input_ids=TOKENS, labels=LABELS)
    assert type(output.logits) is LazyLogits
    check_losses_as_exact([output.loss.item()], [loss(stock.merge_and_unload())], [truth])
