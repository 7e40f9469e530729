"""What one device holds under data, tensor and context parallelism."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from memopt.planner import Degrees, Phase, Trace, shard, trace
from tests.planner import nets

TOKENS = torch.zeros(4, 64, dtype=torch.long)


@pytest.fixture(scope="module")
def whole() -> Trace:
    model = nets.GPT(layers=4)
    return trace(model, (TOKENS, TOKENS), None, torch.optim.AdamW(model.parameters()))


def totals(traced: Trace) -> Counter[str]:
    found: Counter[str] = Counter()
    for storage in traced.storages:
        if storage.producer is not None or storage.birth == 0:
            found[storage.category.value] += storage.bytes
    return found


def live_peak(traced: Trace) -> int:
    """The slow way."""
    return max(
        sum(storage.bytes for storage in traced.storages if storage.birth <= time < storage.death)
        for time in range(len(traced.ops))
    )


def test_one_device_changes_nothing(whole: Trace) -> None:
    alone = shard(whole, Degrees())
    assert (alone.storages, alone.ops, alone.blocks) == (whole.storages, whole.ops, whole.blocks)
    assert alone.peak_bytes == whole.peak_bytes
    assert shard(whole, Degrees(zero=3)).storages[: len(whole.storages)] == whole.storages


@pytest.mark.parametrize("degrees", [Degrees(4, 1, 1, 1), Degrees(4, 1, 1, 2), Degrees(4, 1, 1, 3), Degrees(1, 2, 2)])
def test_the_peak_is_that_of_the_storages(whole: Trace, degrees: Degrees) -> None:
    assert shard(whole, degrees).peak_bytes == live_peak(shard(whole, degrees))


def test_zero_stages_shard_more_and_more(whole: Trace) -> None:
    plain = totals(whole)
    for stage, sharded in enumerate(((), ("optimizer_state",), ("optimizer_state", "gradients"))):
        found = shard(whole, Degrees(data=4, zero=stage))
        own = Counter[str]()
        for storage in found.storages[: len(whole.storages)]:
            own[storage.category.value] += storage.bytes
        for name in ("weights", "gradients", "optimizer_state"):
            expected = plain[name] / (4 if name in sharded else 1)
            assert own[name] == pytest.approx(expected, rel=0.01), (stage, name)
    fully = shard(whole, Degrees(data=4, zero=3))
    weights = sum(storage.bytes for storage in fully.storages if storage.category.value == "weights")
    assert weights == pytest.approx(plain["weights"] / 4, rel=0.01)


def spans(found: Trace, name: str) -> list[tuple[int, int]]:
    return [(storage.birth, storage.death) for storage in found.storages if storage.name == name]


def test_fsdp2_gathers_a_block_while_the_one_before_it_runs_backward(whole: Trace) -> None:
    found = shard(whole, Degrees(data=4, zero=3))
    block, before, after = whole.blocks[2], whole.blocks[1], whole.blocks[3]
    assert spans(found, "gathered parameters of blocks.2") == [block.forward, block.backward]
    assert spans(found, "gathering buffer of blocks.2") == [
        (block.forward[0], after.forward[0]),
        (after.backward[0], block.backward[0]),
    ]
    assert spans(found, "reduction buffer of blocks.2") == [(block.backward[1], before.backward[1])]
    one_layer = sum(parameter.nbytes for parameter in nets.Layer(64, 4).parameters())
    copies = {s.bytes for s in found.storages if s.name.endswith(" of blocks.2")}
    assert copies == {one_layer}


def test_fsdp2_keeps_the_root_gathered_until_backward_is_over(whole: Trace) -> None:
    found = shard(whole, Degrees(data=4, zero=3))
    backward = [op.index for op in whole.ops if op.phase is Phase.BACKWARD]
    assert spans(found, "gathered parameters of the root") == [(0, backward[-1] + 1)]
    (size,) = {s.bytes for s in found.storages if s.name == "gathered parameters of the root"}
    model = nets.GPT(layers=4)
    assert size == sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in model.blocks.parameters())


def test_buffers_are_whole_everywhere() -> None:
    images = torch.zeros(2, 3, 32, 32)
    step = trace(nets.ResNet(), (images,), optimizer="sgd")
    buffers = {s.name: s.bytes for s in step.storages if s.name.startswith("buffer ")}
    found = shard(step, Degrees(data=2, zero=3))
    assert buffers
    assert {s.name: s.bytes for s in found.storages if s.name.startswith("buffer ")} == buffers


def test_every_stage_peaks_lower(whole: Trace) -> None:
    peaks = [shard(whole, Degrees(data=8, zero=stage)).peak_bytes for stage in range(4)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[3] < peaks[0]


def test_tensor_parallel_splits_matrices_and_activations_but_not_norms(whole: Trace) -> None:
    found = shard(whole, Degrees(tensor=4))
    for before, after in zip(whole.storages, found.storages, strict=False):
        if before.category.value == "activations":
            assert after.bytes == -(-before.bytes // 4)
        if before.category.value == "weights":
            assert after.bytes in (before.bytes, -(-before.bytes // 4))
    vectors = [s.bytes for s in found.storages if s.category.value == "weights" and s.bytes == 64 * 4]
    assert len(vectors) >= 2 * 2 * 4  # weight and bias of two norms in four layers
    flops = [sum(op.flops for op in one.ops if op.phase is not Phase.OPTIMIZER) for one in (whole, found)]
    assert flops[1] == pytest.approx(flops[0] / 4, rel=0.01)


def test_context_parallel_splits_tokens_only(whole: Trace) -> None:
    plain, found = totals(whole), totals(shard(whole, Degrees(context=2)))
    assert found["weights"] == plain["weights"]
    assert found["activations"] == pytest.approx(plain["activations"] / 2, rel=0.01)


def test_saved_bytes_follow_their_storages(whole: Trace) -> None:
    found = shard(whole, Degrees(tensor=2, context=2))
    by_id = {storage.id: storage.bytes for storage in found.storages}
    saved = [one for block in found.blocks for one in block.saved]
    assert saved
    assert all(one.bytes == by_id[one.storage] for one in saved)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": 0}, "data must be"),
        ({"tensor": 1.5}, "tensor must be"),
        ({"context": True}, "context must be"),
        ({"zero": 4}, "zero must be"),
    ],
)
def test_impossible_degrees_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Degrees(**values)


def test_devices_multiply() -> None:
    assert Degrees(4, 2, 2).devices == 16
