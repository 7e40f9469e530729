"""What a fused model does with its logits beside the loss: reading, generation, copies, other wrappers, errors."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.integrations.lazy_logits import LazyLogits
from tests.closeness import check_losses_as_exact
from tests.integrations.causal_models import (
    CHUNK_BYTES,
    LABELS,
    TOKENS,
    B,
    NoLogits,
    T,
    V,
    build,
    exact_loss,
    logits_of,
)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("gemma2 softcap")


def test_evaluation_and_inference_make_no_logits_until_they_are_read(model: nn.Module) -> None:
    with torch.no_grad():
        expected = model(input_ids=TOKENS, labels=LABELS)
    truth = exact_loss(model)
    with memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                with NoLogits():
                    output = model(input_ids=TOKENS, labels=LABELS)
                    kept = output.logits.detach()
                assert not kept.requires_grad
                check_losses_as_exact([output.loss.item()], [expected.loss.item()], [truth])
                assert torch.equal(torch.cat([kept, kept]), torch.cat([expected.logits, expected.logits]))


@pytest.mark.parametrize(
    "way",
    [{"do_sample": True}, {"num_beams": 3}, {"output_logits": True, "return_dict_in_generate": True}],
    ids=lambda way: next(iter(way)),
)
def test_generation_is_bitwise_the_same(model: nn.Module, way: dict[str, Any]) -> None:
    def generate() -> Any:
        torch.manual_seed(0)
        made = model.eval().generate(TOKENS[:, :4], max_new_tokens=6, pad_token_id=0, **way)
        return [made] if isinstance(made, Tensor) else [made.sequences, *made.logits]

    expected = generate()
    with memopt.fuse_loss(model):
        assert all(map(torch.equal, generate(), expected))
    model.train()


def test_a_fused_model_is_saved_and_loaded_as_its_own_kind(tmp_path: Path) -> None:
    model = build("llama")
    memopt.fuse_loss(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(logits_of(loaded)) is Tensor
    memopt.fuse_loss(loaded)
    assert type(logits_of(loaded)) is LazyLogits
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("fused_first", [False, True])
def test_models_spread_by_accelerate_stay_fused(tmp_path: Path, fused_first: bool) -> None:
    """Its hooks keep the head's forward aside; weights on the disk come and go with every call."""
    accelerate = pytest.importorskip("accelerate")
    model = build("llama")
    expected, truth = model(input_ids=TOKENS, labels=LABELS).loss.item(), exact_loss(model)
    if fused_first:
        memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES)
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers": "disk", "model.norm": "cpu"}
    model = accelerate.dispatch_model(
        model, {**where, "lm_head": "disk"}, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    handle = memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES)
    with torch.no_grad(), NoLogits():
        check_losses_as_exact([model(input_ids=TOKENS, labels=LABELS).loss.item()], [expected], [truth])
    handle.remove()
    with torch.no_grad():
        output = model(input_ids=TOKENS, labels=LABELS)
    assert output.loss.item() == expected
    assert type(output.logits) is Tensor


def test_logits_travel_as_ordinary_tensors(model: nn.Module) -> None:
    with memopt.fuse_loss(model), torch.no_grad():
        logits = logits_of(model)
        expected = logits + 0
        for copied in (pickle.loads(pickle.dumps(logits)), copy.deepcopy(logits), torch.from_numpy(logits.numpy())):
            assert type(copied) is Tensor
            assert torch.equal(copied, expected)
        assert repr(logits) == repr(expected)


def test_copies_of_a_fused_model_are_fused_and_come_apart() -> None:
    model = build("llama")
    handle = memopt.fuse_loss(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert type(logits_of(other)) is LazyLogits
        assert torch.equal(logits_of(other), logits_of(model))
        memopt.fuse_loss(other).remove()
        assert type(logits_of(other)) is Tensor
    assert type(logits_of(model)) is LazyLogits
    handle.remove()
    handle.remove()
    assert type(logits_of(model)) is Tensor
    assert "forward" not in vars(model.lm_head)


def test_a_second_call_gives_the_same_handle_with_new_options() -> None:
    model = build("llama")
    handle = memopt.fuse_loss(model)
    assert memopt.fuse_loss(model, mode="recompute") is handle
    loss = model(input_ids=TOKENS, labels=LABELS).loss
    loss.backward(retain_graph=True)
    loss.backward()


def test_a_resized_vocabulary_stays_fused() -> None:
    model = build("llama")
    memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES)
    model.resize_token_embeddings(V + 8, mean_resizing=False)
    with NoLogits():
        model(input_ids=TOKENS, labels=LABELS).loss.backward()
    assert logits_of(model).shape == (B, T, V + 8)


def test_logits_of_changed_weights_are_refused() -> None:
    model = build("llama")
    memopt.fuse_loss(model)
    output = model(input_ids=TOKENS, labels=LABELS)
    output.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"read out\.logits before the step"):
        output.logits.argmax(-1)


def test_models_that_cannot_be_fused_are_named() -> None:
    import transformers

    tiny = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    with pytest.raises(ValueError, match="LlamaModel says it has no output head"):
        memopt.fuse_loss(transformers.LlamaModel(transformers.LlamaConfig(**tiny, vocab_size=16)))
    with pytest.raises(ValueError, match=r"Linear has no get_output_embeddings\(\)"):
        memopt.fuse_loss(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not str"):
        memopt.fuse_loss("llama")
    with pytest.raises(TypeError, match="no option chunk; it passes on accumulate, chunk_bytes"):
        memopt.fuse_loss(build("llama"), chunk=3)
    model = build("llama")
    with pytest.raises(ValueError, match="no module of that name"):
        memopt.fuse_loss(model, head="lm_heads")
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.sparse\.Embedding, not a linear layer"):
        memopt.fuse_loss(model, head="model.embed_tokens")
    model.lm_head.forward = lambda hidden: hidden
    with pytest.raises(ValueError, match="has been replaced by"):
        memopt.fuse_loss(model)
    assert "_memopt_fused_loss" not in vars(model)


def test_compiled_models_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"torch\.compile"):
        memopt.fuse_loss(torch.compile(build("llama"), backend="eager"))


def test_a_model_compiled_afterwards_makes_its_logits(model: nn.Module) -> None:
    expected = model(input_ids=TOKENS, labels=LABELS)
    with memopt.fuse_loss(model):
        output = torch.compile(model, backend="eager")(input_ids=TOKENS, labels=LABELS)
    assert output.loss.item() == expected.loss.item()
    assert type(output.logits) is Tensor


def test_data_parallel_is_refused_by_name() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="does not work under DataParallel"):
        memopt.fuse_loss(nn.DataParallel(model))
    memopt.fuse_loss(model)
    with pytest.raises(ValueError, match="does not work under DataParallel"):
        model._replicate_for_data_parallel()(input_ids=TOKENS)  # what it runs on every device


def test_a_partitioned_head_makes_its_logits_and_says_so() -> None:
    model = build("llama")
    model.lm_head.weight.ds_id = 3  # as DeepSpeed's ZeRO 3 marks them
    memopt.fuse_loss(model)
    with pytest.warns(UserWarning, match="makes all logits after all, because its weight is partitioned"):
        assert type(logits_of(model)) is Tensor


def test_trace_and_meter_agree() -> None:
    model, inputs = build("llama"), {"input_ids": TOKENS, "labels": LABELS}
    memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES)
    traced = memopt.trace(model, inputs)
    with memopt.meter(model) as metered:
        model(**inputs).loss.backward()
    assert abs(traced.peak_bytes - metered.peak_bytes) <= metered.peak_bytes // 100  # as docs/offload.md promises
    assert metered.peak_by_category["logits_and_loss"] < B * (T - 1) * V
