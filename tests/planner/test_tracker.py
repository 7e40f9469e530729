"""The storage tracker: births, deaths, sizes and categories of storages."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_pre_hooks

from memopt.planner.tracking import Profile, StorageTracker, profile, register_scratch, settle, tensors_in
from memopt.planner.tracking.records import rounded_bytes, scratch_bytes
from memopt.planner.values import Category, Phase
from tests.planner.nets import GPT


@contextmanager
def tracking(tracker: StorageTracker) -> Iterator[None]:
    tracker.start()
    try:
        yield
    finally:
        tracker.stop()


def measured(tracker: StorageTracker) -> Profile:
    return profile(tracker.history, settle(tracker.history))


def test_a_storage_lives_from_its_operation_to_the_last_view() -> None:
    tracker = StorageTracker()
    with tracking(tracker):
        a = torch.zeros(100)  # operation 0
        view = a[10:20]  # 1
        del a
        torch.ones(7)  # 2, dies at once
        del view
        torch.ones(3)  # 3
    lives = {record.bytes: (record.birth, record.death) for record in tracker.history.records}
    assert lives[400] == (0, 3)
    assert lives[28] == (2, 3)
    assert lives[12] == (3, None) or lives[12] == (3, 4)
    assert measured(tracker).peak_bytes == 428


def test_in_place_operations_and_views_allocate_nothing() -> None:
    tracker = StorageTracker()
    with tracking(tracker):
        a = torch.zeros(8, 8)
        a.add_(1).view(-1)[3:].mul_(2)
    assert [record.bytes for record in tracker.history.records if record.producer == 0] == [256]
    assert measured(tracker).peak_bytes == 256


def test_what_existed_before_counts_from_the_start_once_it_is_touched() -> None:
    old, untouched = torch.zeros(50), torch.zeros(60)
    tracker = StorageTracker()
    with tracking(tracker):
        torch.ones(5)
        old.sum()
    sizes = {record.bytes: record.birth for record in tracker.history.records}
    assert sizes[200] == 0
    assert 240 not in sizes
    del untouched


def test_a_resized_storage_becomes_a_new_record() -> None:
    tracker = StorageTracker()
    with tracking(tracker):
        a = torch.zeros(10)
        a.untyped_storage().resize_(400)
        a.sum()
        torch.zeros(3)
    before, after = [record for record in tracker.history.records if record.bytes in (40, 400)]
    assert (before.bytes, before.birth, before.death) == (40, 0, 1)
    assert (after.bytes, after.birth, after.death) == (400, 1, None)


def test_nothing_is_kept_alive_and_no_hook_stays() -> None:
    model = GPT(1, 16, 2, 20)
    tracker = StorageTracker()
    tracker.adopt_module(model)
    with tracking(tracker):
        out = model(torch.zeros(1, 4, dtype=torch.long))
    gone = weakref.ref(out.untyped_storage())
    del out
    assert gone() is None
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    assert not _global_optimizer_pre_hooks
    assert all(not parameter._backward_hooks for parameter in model.parameters())


def test_phases_of_a_plain_loop() -> None:
    model = GPT(1, 16, 2, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    tracker = StorageTracker()
    with tracking(tracker):
        for _ in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    order = [
        phase for i, phase in enumerate(tracker.history.phases) if not i or tracker.history.phases[i - 1] is not phase
    ]
    assert order == [Phase.FORWARD, Phase.LOSS, Phase.BACKWARD, Phase.OPTIMIZER] * 2
    assert len(tracker.history.backward_starts) == 2


def test_two_models_in_a_row_are_both_forward() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    tracker = StorageTracker()
    with tracking(tracker):
        second(first(torch.ones(2, 4)) * 2).sum().backward()
    names = dict(zip(tracker.history.names, tracker.history.phases, strict=True))
    assert names["aten.sum.default"] is Phase.LOSS
    assert tracker.history.phases[tracker.history.names.index("aten.mul.Tensor")] is Phase.FORWARD


def test_categories_of_a_training_step() -> None:
    width, vocabulary, rows = 16, 50, 12
    model = GPT(1, width, 2, vocabulary)
    optimizer = torch.optim.Adam(model.parameters())
    tokens = torch.zeros(3, 4, dtype=torch.long)
    tracker = StorageTracker()
    tracker.adopt_module(model)
    with tracking(tracker):
        logits = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
    totals = dict.fromkeys(Category, 0)
    for record, category in zip(tracker.history.records, settle(tracker.history), strict=True):
        totals[category] += record.bytes
    parameter_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert totals[Category.WEIGHTS] == parameter_bytes
    assert totals[Category.GRADIENTS] == parameter_bytes
    assert totals[Category.OPTIMIZER] == 2 * parameter_bytes + 4 * len(list(model.parameters()))
    # logits, their log-softmax and the gradient of each: four times rows x vocabulary in float32, and small change
    assert 4 * rows * vocabulary * 4 <= totals[Category.LOGITS] <= 4 * rows * vocabulary * 4 + 200
    assert totals[Category.ACTIVATIONS] > 0


def test_logits_and_loss_are_found_inside_the_model_too() -> None:
    model = GPT(1, 16, 2, 50)
    tokens = torch.zeros(3, 4, dtype=torch.long)
    tracker = StorageTracker()
    tracker.adopt_module(model)
    with tracking(tracker):
        model(tokens, tokens).backward()
    sizes = [
        record.bytes
        for record, category in zip(tracker.history.records, settle(tracker.history), strict=True)
        if category is Category.LOGITS
    ]
    assert sizes.count(12 * 50 * 4) == 4


def test_scratch_is_counted_with_its_operation() -> None:
    name = "aten::sinh"
    register_scratch(name, lambda args, kwargs: 7 * args[0].numel())
    try:
        assert scratch_bytes(name, (torch.ones(3),), {}) == 21
        tracker = StorageTracker()
        with tracking(tracker):
            a = torch.zeros(10).sinh()
            torch.ones(1)
        assert measured(tracker).peak_bytes == 40 + 40 + 70
        assert a is not None
    finally:
        register_scratch(name, lambda args, kwargs: 0)


def test_operations_of_memopt_are_followed_inside() -> None:
    library = torch.library.Library("memopt", "FRAGMENT")
    library.define("test_tracker_cross_entropy(Tensor x) -> Tensor")

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(1000).fill_(1).sum() * x

    library.impl("test_tracker_cross_entropy", kernel, "CPU")
    tracker = StorageTracker()
    with tracking(tracker):
        torch.ops.memopt.test_tracker_cross_entropy(torch.ones(2))
    settled = settle(tracker.history)
    inside = [c for r, c in zip(tracker.history.records, settled, strict=True) if r.bytes == 4000]
    assert inside == [Category.LOGITS]
    library._destroy()


@pytest.mark.parametrize(
    ("size", "device", "rounded"), [(1, "cuda", 512), (512, "cuda", 512), (513, "cuda", 1024), (1, "cpu", 1)]
)
def test_cuda_sizes_are_rounded(size: int, device: str, rounded: int) -> None:
    assert rounded_bytes(size, device) == rounded


def test_tensors_are_found_in_nested_values() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    assert [len(t) for t in tensors_in({"x": [a, (b, None)], "y": {"z": c}, "n": 3})] == [1, 2, 3]


def test_an_exception_in_the_model_leaves_phases_in_order() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.inner(x)
            raise RuntimeError("broken")

    model, tracker = Broken(), StorageTracker()
    with tracking(tracker):
        with pytest.raises(RuntimeError, match="broken"):
            model(torch.ones(1, 2))
        model.inner(torch.ones(1, 2)).sum().backward()
    assert Phase.LOSS in tracker.history.phases
    assert tracker.history.phases[-1] is Phase.BACKWARD


def test_a_model_s_outputs_are_logits_whatever_the_loss_is_made_of() -> None:
    model, x, tracker = nn.Linear(4, 50), torch.zeros(3, 4), StorageTracker()
    with tracking(tracker):
        output = model(x)
        output.square().mean().backward()
    phases = tracker.history.phases
    made = [r for r in tracker.history.records if r.producer is not None and phases[r.producer] is Phase.FORWARD]
    assert [record.category for record in made if record.bytes == output.nbytes] == [Category.LOGITS]


def test_what_a_loss_reads_is_logits_only_where_an_operation_made_it() -> None:
    given, target, tracker = torch.zeros(3, 50), torch.zeros(3, dtype=torch.long), StorageTracker()
    with tracking(tracker):
        F.cross_entropy(given, target)
        F.cross_entropy(given + 1, target)
    of_size = [record for record in tracker.history.records if record.bytes == given.nbytes]
    assert of_size[0].producer is None
    assert of_size[0].category is None
    assert {record.category for record in of_size[1:]} == {Category.LOGITS}
