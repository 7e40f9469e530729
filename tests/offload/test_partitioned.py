"""A partitioned parameter in each of its states; the whole of it, with DeepSpeed itself, is in tests/integrations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memopt.offload import UnsupportedBlockError
from memopt.offload.partitioned import Partitioned, SavedParameter, partitioned_parameters

VALUE = torch.arange(12.0).view(3, 4)


class Status:
    def __init__(self, name: str) -> None:
        self.name = name


class Gather:
    def __init__(self, parameter: Any) -> None:
        self.parameter = parameter

    def wait(self) -> None:
        self.parameter.data, self.parameter.ds_status = VALUE.clone(), Status("AVAILABLE")


def parameter(status: str, data: Tensor | None = None) -> Any:
    """Marked and behaving as DeepSpeed's are; ``gathers`` counts."""
    made: Any = nn.Parameter(VALUE.clone() if status == "AVAILABLE" else torch.empty(0))
    if data is not None:
        made.data = data
    made.ds_id, made.ds_shape, made.ds_status, made.gathers = 0, VALUE.shape, Status(status), 0

    def all_gather() -> None:
        Gather(made).wait()
        made.gathers += 1

    def partition() -> None:
        made.data, made.ds_status = torch.empty(0), Status("NOT_AVAILABLE")

    made.all_gather, made.partition = all_gather, partition
    return made


def test_a_parameter_that_is_not_whole_is_gathered_and_let_go() -> None:
    one = parameter("NOT_AVAILABLE")
    assert torch.equal(Partitioned(one, {}).gathered(), VALUE)
    assert (one.gathers, one.ds_status.name, one.numel()) == (1, "NOT_AVAILABLE", 0)


def test_a_whole_parameter_is_left_alone() -> None:
    one = parameter("AVAILABLE")
    got = Partitioned(one, {}).gathered()
    assert got.data_ptr() == one.data_ptr()
    assert (one.gathers, one.ds_status.name) == (0, "AVAILABLE")


def test_a_gather_in_flight_is_waited_for_and_stays() -> None:
    one = parameter("INFLIGHT")
    in_flight = {one: Gather(one)}
    assert torch.equal(Partitioned(one, in_flight).gathered(), VALUE)
    assert (one.gathers, one.ds_status.name, in_flight) == (0, "AVAILABLE", {})


def test_views_of_a_parameter_within_a_larger_storage_come_back_at_their_place() -> None:
    flat = torch.cat([torch.full((5,), -1.0), VALUE.flatten(), torch.full((5,), -1.0)])
    one = parameter("AVAILABLE", flat[5:17].view(3, 4))
    owner = Partitioned(one, {})
    view = one.detach().t()[1:]
    assert owner.holds(view)
    assert not owner.holds(flat[:5])
    assert not owner.holds(flat[17:])
    saved = SavedParameter(view, owner, "'block'")
    one.partition()
    assert torch.equal(saved.unpack(), VALUE.t()[1:])


def test_a_plan_for_a_part_of_the_engines_model_is_refused() -> None:
    block = nn.Linear(4, 3, bias=False)
    block.weight = parameter("NOT_AVAILABLE")
    with pytest.raises(UnsupportedBlockError, match=r"apply it to engine\.module"):
        partitioned_parameters(block, "block", nn.Sequential(block))
