"""A fused model under PEFT: adapters in the body, on the head, a trained copy of the head; wrapped before or after."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import memopt
from memopt.integrations.lazy_logits import LazyLogits
from tests.integrations.causal_models import CHUNK_BYTES, LABELS, TOKENS, NoLogits, build, gradients

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
    torch.manual_seed(2)  # of the adapters' dropout
    output = model(input_ids=TOKENS, labels=LABELS)
    output.loss.backward()
    return output, gradients(model)


@pytest.mark.parametrize("fused_first", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_adapters_get_the_stock_model_s_gradients(case: str, fused_first: bool) -> None:
    plain, expected = step(adapted(build("llama"), case))
    base = build("llama")
    if fused_first:
        memopt.fuse_loss(base, chunk_bytes=CHUNK_BYTES)
    model = adapted(base, case)
    memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES)
    with nullcontext() if case == "dora" else NoLogits():
        output, found = step(model)
    assert output.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    torch.testing.assert_close(torch.as_tensor(output.logits.detach()) + 0, plain.logits.detach())


def test_adapters_of_the_head_can_be_switched_off_and_merged() -> None:
    model = adapted(build("llama"), "head")
    memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES)

    def loss() -> float:
        return model(input_ids=TOKENS, labels=LABELS).loss.item()

    with NoLogits():
        with_adapters = loss()
        with model.disable_adapter():
            without = loss()
    assert without != pytest.approx(with_adapters, rel=1e-3)
    model.merge_adapter()
    assert loss() == pytest.approx(with_adapters, rel=1e-5)
    with model.disable_adapter():  # takes the merge back
        assert loss() == pytest.approx(without, rel=1e-5)


def test_taking_the_adapters_off_leaves_a_fused_model() -> None:
    model = adapted(build("llama"), "head")
    memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES)
    expected, _ = step(model)
    merged = model.merge_and_unload()
    with torch.no_grad(), NoLogits():
        output = merged(input_ids=TOKENS, labels=LABELS)
    assert type(output.logits) is LazyLogits
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
