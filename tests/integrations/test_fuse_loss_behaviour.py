"""What a fused model does with its logits: own losses, reading, generation, autocast, copies, errors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memopt
from memopt.integrations.lazy_logits import LazyLogits
from tests.integrations.causal_models import CHUNK_BYTES, B, NoLogits, T, V, batch, build, gradients

TOKENS, LABELS = batch()
NEXT = LABELS[:, 1:]


def logits_of(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


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


@pytest.mark.parametrize("way", [*WITHOUT_LOGITS, *WITH_LOGITS], ids=lambda way: way.__name__)
def test_any_loss_has_the_stock_model_s_value_and_gradients(
    model: nn.Module, way: Callable[[nn.Module], Tensor]
) -> None:
    expected_loss = way(model)
    expected_loss.backward()
    expected = gradients(model)
    guard = NoLogits() if way in WITHOUT_LOGITS else nullcontext()
    with memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES), guard:
        loss = way(model)
        loss.backward()
    found = gradients(model)
    assert loss.dtype == expected_loss.dtype
    # The two sum the same products in other orders: a few units in the last place, magnified by cancellation.
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("loss_inside", [True, False])
def test_autocast(model: nn.Module, loss_inside: bool) -> None:
    def run() -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=TOKENS, labels=LABELS)
        assert output.logits.dtype == torch.bfloat16
        loss = output.loss if loss_inside else shifted_of(output.logits.float())
        loss.backward()
        return loss, gradients(model)

    def shifted_of(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), NEXT.flatten())

    expected_loss, expected = run()
    with memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES), NoLogits():
        loss, found = run()
    assert loss.dtype == expected_loss.dtype == torch.float32
    eps = torch.finfo(torch.bfloat16).eps  # of the roundings that only the stock model makes
    assert loss.item() == pytest.approx(expected_loss.item(), rel=eps)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 4 * eps * gradient.norm(), name


def test_evaluation_and_inference_make_no_logits_until_they_are_read(model: nn.Module) -> None:
    with torch.no_grad():
        expected = model(input_ids=TOKENS, labels=LABELS)
    with memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                with NoLogits():
                    output = model(input_ids=TOKENS, labels=LABELS)
                    kept = output.logits.detach()
                assert not kept.requires_grad
                assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
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
    expected = model(input_ids=TOKENS, labels=LABELS).loss.item()
    if fused_first:
        memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES)
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers": "disk", "model.norm": "cpu"}
    model = accelerate.dispatch_model(
        model, {**where, "lm_head": "disk"}, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    handle = memopt.fuse_loss(model, chunk_bytes=CHUNK_BYTES)
    with torch.no_grad(), NoLogits():
        assert model(input_ids=TOKENS, labels=LABELS).loss.item() == pytest.approx(expected, rel=1e-6)
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
    assert traced.peak_bytes == pytest.approx(metered.peak_bytes, rel=0.01)
    assert metered.peak_by_category["logits_and_loss"] < B * (T - 1) * V
