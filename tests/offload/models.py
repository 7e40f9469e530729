"""Blocks of every kind, each in a small trainable model, with inputs; and random plans for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.gpt import GPT, GPTConfig
from memopt.offload import apply
from memopt.offload.template import Kind
from memopt.planner.values import Action, BlockPlan, StorageAction


class ResBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(8) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x.mean((2, 3))), y)


class ViewBlock(nn.Module):
    """Views of views, slices written in place, chunks, expanded tensors, several inputs and outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.scale = nn.Parameter(torch.ones(width))
        self.out = nn.Linear(width, width)
        self.register_buffer("mask", torch.tril(torch.ones(7, 7)).bool())

    def forward(self, x: Tensor, *, gate: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self.qkv(x).chunk(3, -1)
        a = torch.softmax((q @ k.transpose(-1, -2)).masked_fill(~self.mask, -1e9), -1)
        a = F.dropout(a, 0.2, self.training)
        y = torch.empty_like(v)
        y[..., ::2] = (a @ v)[..., ::2]
        y[..., 1::2] = torch.tanh(a @ v)[..., 1::2] * 2
        z = y * self.scale.expand_as(y)
        z.mul_(gate[:, None, None])
        z = F.dropout(z, 0.1, self.training)
        u = torch.cat([z[:, :3].sigmoid(), z[:, 3:].exp().log1p()], 1)
        return self.out(u.transpose(0, 1)).transpose(0, 1) + x, {"extra": u.square().mean()}


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList(ViewBlock(16) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x, extra = self.token(tokens), torch.zeros((), device=tokens.device)
        gate = torch.linspace(0.5, 1.0, len(tokens), device=tokens.device)
        for block in self.blocks:
            x, more = block(x, gate=gate)
            extra = extra + more["extra"]
        return x.square().mean() + extra


class Twice(nn.Module):
    """One block called three times a step."""

    def __init__(self) -> None:
        super().__init__()
        self.block = ResBlock(3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x.square().mean()


def gpt(dropout: float = 0.1) -> GPT:
    return GPT(GPTConfig(layers=3, width=32, heads=4, context=16, vocabulary=17, dropout=dropout))


@dataclass
class Case:
    """A model maker, its inputs, the paths of its blocks, calls per step, and the autocast dtype if any."""

    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], tuple[Any, ...]]
    blocks: tuple[str, ...]
    calls: int = 1
    autocast: torch.dtype | None = None


class Llama(nn.Module):
    """Two Llama layers of transformers, with grouped-query attention, attention dropout and a cache (the default)."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=17,
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_dropout=0.1,
        )
        self.model = LlamaForCausalLM(config).train()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, labels=tokens).loss


class T5(nn.Module):
    """An encoder and a decoder of two T5 blocks each, with dropout; the decoder fills a cache, as is the default."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(
            vocab_size=17,
            d_model=16,
            d_kv=4,
            d_ff=32,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.1,
            decoder_start_token_id=0,
        )
        self.model = T5ForConditionalGeneration(config).train()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, labels=tokens[:, :9].contiguous()).loss


def _tokens(g: torch.Generator, high: int = 17, shape: tuple[int, int] = (3, 16)) -> Tensor:
    return torch.randint(high, shape, generator=g)


CASES = {
    "gpt": Case(gpt, lambda g: (_tokens(g), _tokens(g)), ("blocks.0", "blocks.1", "blocks.2")),
    "gpt-autocast": Case(
        gpt, lambda g: (_tokens(g), _tokens(g)), ("blocks.0", "blocks.1", "blocks.2"), autocast=torch.bfloat16
    ),
    "resnet": Case(
        ResNet,
        lambda g: (torch.randn(4, 3, 8, 8, generator=g), torch.randint(5, (4,), generator=g)),
        ("blocks.0", "blocks.1", "blocks.2"),
    ),
    "views": Case(Views, lambda g: (_tokens(g, 11, (5, 7)),), ("blocks.0", "blocks.1", "blocks.2")),
    "llama-autocast": Case(
        Llama,
        lambda g: (_tokens(g, shape=(2, 12)),),
        ("model.model.layers.0", "model.model.layers.1"),
        autocast=torch.bfloat16,
    ),
    "t5": Case(
        T5,
        lambda g: (_tokens(g, shape=(2, 12)),),
        ("model.encoder.block.0", "model.encoder.block.1", "model.decoder.block.0", "model.decoder.block.1"),
    ),
    "twice": Case(Twice, lambda g: (torch.randn(4, 3, 8, 8, generator=g),), ("block",), calls=3),
}


def step_loss(case: Case, model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    with torch.autocast(inputs[0].device.type, case.autocast or torch.bfloat16, enabled=case.autocast is not None):
        return model(*inputs)


def templates(case: Case, model: nn.Module, inputs: tuple[Any, ...]) -> dict[tuple[str, int], Any]:
    """What each block call saves, found by an all-keep plan; the model's state is put back."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    plan = make_plan(case, {})
    with apply(model, plan) as handle:
        step_loss(case, model, inputs)
        found = {
            (planned.path, n): template for planned in handle.blocks for n, template in enumerate(planned._templates)
        }
    model.load_state_dict(state)
    torch.set_rng_state(rng)
    return found


def make_plan(case: Case, actions: dict[tuple[str, int], tuple[StorageAction, ...]], tier: str = "host") -> Any:
    blocks = tuple(
        BlockPlan(path, call, "", actions.get((path, call), ())) for path in case.blocks for call in range(case.calls)
    )
    return SimpleNamespace(blocks=blocks, swap_tier=tier)


def mixture(
    found: dict[tuple[str, int], Any], seed: int, actions: tuple[Action, ...]
) -> dict[tuple[str, int], tuple[StorageAction, ...]]:
    """A random action for every saved storage, with its real bytes."""
    draw = random.Random(seed)
    return {
        key: tuple(
            StorageAction(n, t.sizes[storage], draw.choice(actions))
            for n, storage in enumerate(t.saved)
            if t.kinds[storage] is Kind.MADE
        )
        for key, t in found.items()
    }


def parted(plan: Any, found: dict[tuple[str, int], Any], seed: int) -> Any:
    """The plan with half of its swaps split into a swapped and a kept share, and half of the saved inputs swapped."""
    draw = random.Random(seed)

    def split(action: StorageAction) -> list[StorageAction]:
        if action.action is not Action.SWAP or draw.random() < 0.5:
            return [action]
        share = draw.choice((0.25, 0.5, 0.75, 0.9))
        return [replace(action, fraction=share), replace(action, action=Action.KEEP, fraction=1 - share)]

    def inputs(key: tuple[str, int]) -> list[StorageAction]:
        sizes = [found[key].sizes[s] for s in found[key].saved_inputs]
        return [StorageAction(n, size, Action.SWAP) for n, size in enumerate(sizes) if draw.random() < 0.5]

    return SimpleNamespace(
        blocks=tuple(
            replace(
                block,
                actions=tuple(part for action in block.actions for part in split(action)),
                inputs=tuple(part for action in inputs((block.path, block.call)) for part in split(action)),
            )
            for block in plan.blocks
        ),
        swap_tier=plan.swap_tier,
    )


def everything(found: dict[tuple[str, int], Any], action: Action) -> dict[tuple[str, int], tuple[StorageAction, ...]]:
    """The same action for every saved storage."""
    return mixture(found, 0, (action,))


def run(case: Case, model: nn.Module, batches: list[tuple[Any, ...]], accumulate: int = 1) -> list[Any]:
    """Train; returns losses, gradients, and in the end state and random state: all to be compared bitwise."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(123)
    seen: list[Any] = []
    for start in range(0, len(batches), accumulate):
        for inputs in batches[start : start + accumulate]:
            loss = step_loss(case, model, inputs)
            loss.backward()
            seen.append(loss.detach())
        seen.extend(p.grad.clone() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, *(value.clone() for value in model.state_dict().values()), torch.get_rng_state()]


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
