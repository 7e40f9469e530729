"""Blocks are found by structure, with what autograd saves in them in its order."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from memopt.planner import Phase, block_signature, describe, trace
from tests.planner import nets

TOKENS = torch.zeros(2, 16, dtype=torch.long)


def paths(model: nn.Module, inputs: Tensor) -> list[str]:
    return [block.path for block in trace(model, inputs).blocks]


def test_transformer_layers_are_one_group() -> None:
    traced = trace(nets.GPT(4), TOKENS)
    assert [block.path for block in traced.blocks] == [f"blocks.{i}" for i in range(4)]
    assert {block.group for block in traced.blocks} == {0}
    assert len({block.signature for block in traced.blocks}) == 1


def test_names_do_not_matter() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zebra, self.inner, self.apple = nets.Layer(16, 2), nn.Linear(16, 16), nets.Layer(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.apple(self.inner(self.zebra(x)))

    assert paths(Odd(), torch.ones(1, 4, 16)) == ["zebra", "apple"]


def test_a_layer_called_again_is_a_block_twice() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nets.Layer(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(self.layer(x)))

    blocks = trace(Shared(), torch.ones(1, 4, 16)).blocks
    assert [(block.path, block.call) for block in blocks] == [("layer", 0), ("layer", 1), ("layer", 2)]


def test_blocks_of_other_shapes_are_other_groups() -> None:
    blocks = trace(nets.ResNet((8, 16), 3), torch.ones(2, 3, 16, 16)).blocks
    assert [block.path for block in blocks] == [f"stages.{s}.{b}" for s in range(2) for b in range(3)]
    assert [block.group for block in blocks] == [0, 0, 0, 1, 2, 2]


def test_u_net_blocks_differ_in_shape_only() -> None:
    traced = trace(nets.UNet(), torch.ones(1, 3, 32, 32))
    assert [block.path for block in traced.blocks] == ["down.0", "down.1", "down.2", "up.0", "up.1"]
    assert len({block.group for block in traced.blocks}) == 5


def test_plain_layers_are_no_blocks() -> None:
    assert paths(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.ones(2, 4)) == []


def test_ranges_enclose_the_operations_of_the_block() -> None:
    traced = trace(nets.GPT(3), (TOKENS, TOKENS))
    for number, block in enumerate(traced.blocks):
        inside = {op.index for op in traced.ops if op.block == number}
        forward = {i for i in inside if traced.ops[i].phase is Phase.FORWARD}
        backward = {i for i in inside if traced.ops[i].phase is Phase.BACKWARD}
        assert forward == set(range(*block.forward))
        assert (min(backward), max(backward) + 1) == block.backward
    starts = [block.backward[0] for block in traced.blocks]
    assert starts == sorted(starts, reverse=True)


def test_saved_storages_are_those_that_autograd_packs() -> None:
    """Against the saved tensors of a real run, packed by real hooks around one block."""
    layer, x = nets.Layer(16, 2), torch.randn(2, 4, 16, requires_grad=True)
    known = {p.untyped_storage()._cdata for p in layer.parameters()} | {x.untyped_storage()._cdata}
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            known.add(tensor.untyped_storage()._cdata)
            packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    model = nn.Sequential(nets.Layer(16, 2), nets.Layer(16, 2))
    block = trace(model, x.detach()).blocks[1]
    assert [saved.bytes for saved in block.saved] == [tensor.untyped_storage().nbytes() for tensor in packed]
    assert [saved.index for saved in block.saved] == list(range(len(packed)))


def test_token_wise_storages() -> None:
    block = trace(nets.GPT(2), TOKENS).blocks[0]
    traced = trace(nets.GPT(2), TOKENS)
    by_operation = {traced.ops[saved.producer].name.split(".")[1]: saved.token_wise for saved in block.saved}
    assert by_operation["addmm"]
    assert by_operation["gelu"]
    assert by_operation["native_layer_norm"]
    assert not by_operation["_scaled_dot_product_flash_attention_for_cpu"]


def test_random_operations_are_marked() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5) + F.dropout(x, 0.0)

    model = nn.Sequential(nn.Linear(4, 4), Noisy())
    names = [op.name for op in trace(model, torch.ones(2, 4)).ops if op.random]
    assert len(names) == 1


def test_flops_of_a_linear_layer() -> None:
    traced = trace(nn.Linear(32, 64, bias=False), torch.ones(8, 32))
    forward = sum(op.flops for op in traced.ops if op.phase is Phase.FORWARD)
    assert forward == 2 * 8 * 32 * 64
    assert sum(op.flops for op in traced.ops) == 2 * forward  # the input needs no gradient


def test_views_move_no_bytes() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1).unsqueeze(0).expand(3, -1)

    traced = trace(nn.Sequential(nn.Linear(4, 4), Views()), torch.ones(2, 4))
    views = [op for op in traced.ops if op.name.split(".")[1] in ("view", "unsqueeze", "expand", "t")]
    assert {op.name.split(".")[1] for op in views} == {"view", "unsqueeze", "expand", "t"}
    assert all((op.bytes_read, op.bytes_written, op.writes) == (0, 0, ()) for op in views)


def test_in_place_operations_write_what_they_change() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu_()

    traced = trace(nn.Sequential(nn.Linear(4, 4), InPlace()), torch.ones(2, 4))
    linear = next(op for op in traced.ops if op.name == "aten.addmm.default")
    relu = next(op for op in traced.ops if op.name == "aten.relu_.default")
    assert relu.writes == linear.writes
    assert relu.bytes_written == 2 * 4 * 4


class Entries(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.entries: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        self.entries.append(describe(func._schema.name, output))
        return output


def test_the_runtime_computes_the_same_signature_on_real_tensors() -> None:
    model = nets.GPT(2)
    block = trace(model, TOKENS).blocks[1]
    recorder = Entries()
    handles = [
        model.blocks[1].register_forward_pre_hook(lambda *_: recorder.__enter__() and None),
        model.blocks[1].register_forward_hook(lambda *_: recorder.__exit__(None, None, None)),
    ]
    model(TOKENS)
    for handle in handles:
        handle.remove()
    assert block_signature(recorder.entries) == block.signature  # type: ignore[arg-type]


def test_signatures_know_shapes_types_and_order() -> None:
    a, b = describe("aten::mm", torch.ones(2, 3)), describe("aten::add", torch.ones(2, 3))
    assert block_signature([a, b]) != block_signature([b, a])
    assert block_signature([a]) != block_signature([describe("aten::mm", torch.ones(3, 2))])
    assert block_signature([a]) != block_signature([describe("aten::mm", torch.ones(2, 3).double())])
    assert block_signature([a, None]) == block_signature([a])
    assert describe("aten::view", torch.ones(1)) is None
    flash = describe("aten::_scaled_dot_product_flash_attention", (torch.ones(1), torch.ones(2)))
    assert flash == describe("aten._scaled_dot_product_flash_attention_for_cpu.default", (torch.ones(1),))


def test_saved_inputs_are_kept_apart() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(x).tanh()

    traced = trace(nn.Sequential(Residual(), Residual()), torch.ones(4, 8))
    first, second = traced.blocks
    assert [traced.ops[saved.producer].name for saved in second.saved] == ["aten.tanh.default"]
    assert [saved.storage for saved in second.saved_inputs] == list(first.outputs)
    assert second.saved_inputs[0].bytes == 4 * 8 * 4


def test_where_nothing_repeats_the_largest_parts_are_blocks() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x))

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.two(F.gelu(self.one(x))))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(Stem(), Body())
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.features(x).mean((2, 3)))

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    images = torch.ones(2, 3, 16, 16)
    assert paths(Wrapped(), images) == ["module.features.0", "module.features.1"]
    assert paths(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)), torch.ones(2, 4)) == []
