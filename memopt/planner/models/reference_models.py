"""Plain torch models of the families that the presets name: as anyone would train them, for tracing, without weights.

They follow the published configurations layer by layer, so that parameters, shapes and what backward saves are those of
the real models; they load no checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only language model. ``kv_heads``, ``head_width`` and ``expert_width`` of 0 mean: follow the others."""

    layers: int
    width: int
    heads: int
    mlp_width: int
    vocabulary: int
    context: int
    kv_heads: int = 0
    head_width: int = 0
    norm: str = "rms"
    mlp: str = "swiglu"
    positions: str = "rotary"
    bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    dropout: float = 0.0
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0

    @property
    def keys(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.head_width or self.width // self.heads


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer that classifies images."""

    layers: int
    width: int
    heads: int
    mlp_width: int
    image: int
    patch: int
    classes: int


def _norm(kind: str, width: int) -> nn.Module:
    return nn.RMSNorm(width, eps=1e-5) if kind == "rms" else nn.LayerNorm(width)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


class Attention(nn.Module):
    """Causal attention with grouped keys: (batch, tokens, width) to the same shape."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.keys, self.head = config.heads, config.keys, config.head
        bias = config.bias or config.qkv_bias
        self.query = nn.Linear(config.width, self.heads * self.head, bias=bias)
        self.key = nn.Linear(config.width, self.keys * self.head, bias=bias)
        self.value = nn.Linear(config.width, self.keys * self.head, bias=bias)
        self.out = nn.Linear(self.heads * self.head, config.width, bias=config.bias)
        self.query_norm = _norm("rms", self.head) if config.qk_norm else None
        self.key_norm = _norm("rms", self.head) if config.qk_norm else None
        self.dropout = config.dropout

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, tokens, _ = x.shape
        query = self.query(x).view(batch, tokens, self.heads, self.head)
        key = self.key(x).view(batch, tokens, self.keys, self.head)
        value = self.value(x).view(batch, tokens, self.keys, self.head).transpose(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if rotary is not None:
            query, key = _rotated(query, *rotary), _rotated(key, *rotary)
        found = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            enable_gqa=self.keys != self.heads,
        )
        return self.out(found.transpose(1, 2).reshape(batch, tokens, -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Gated (SwiGLU) or plain (GELU) feed-forward layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner = config.width, config.mlp_width
        self.gate = nn.Linear(width, inner, bias=config.bias) if config.mlp == "swiglu" else None
        self.up, self.down = nn.Linear(width, inner, bias=config.bias), nn.Linear(inner, width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.up(x), approximate="tanh") if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return self.down(inner)  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Routed SwiGLU experts: rows sorted by expert, then one grouped matrix product for each of the three matrices."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        count, width, inner = config.experts, config.width, config.expert_width or config.mlp_width
        self.top = config.experts_per_token
        self.router = nn.Linear(width, count, bias=False)
        self.gate, self.up = (nn.Parameter(torch.empty(count, width, inner)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(count, inner, width))
        for weight in (self.gate, self.up, self.down):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        shares, chosen = self.router(rows).softmax(-1, dtype=torch.float32).topk(self.top, -1)
        shares = (shares / shares.sum(-1, keepdim=True)).to(rows.dtype).flatten()
        order = chosen.flatten().sort().indices
        source = order // self.top
        ends = torch.bincount(chosen.flatten(), minlength=self.router.out_features).cumsum(0).int()
        grouped = rows[source]
        inner = F.silu(torch._grouped_mm(grouped, self.gate, offs=ends)) * torch._grouped_mm(
            grouped, self.up, offs=ends
        )
        found = torch._grouped_mm(inner, self.down, offs=ends) * shares[order].unsqueeze(-1)
        return torch.zeros_like(rows).index_add(0, source, found).view_as(x)


class DecoderBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.norm1, self.attention = _norm(config.norm, config.width), Attention(config)
        self.norm2, self.mlp = _norm(config.norm, config.width), Experts(config) if config.experts else MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), rotary))
        return x + self.dropout(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Tokens and targets (batch, tokens), int64, to the mean cross-entropy in float32; without targets the logits."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.layers))
        self.norm = _norm(config.norm, config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.token(tokens)
        if self.position is not None:
            x = x + self.position.weight[: tokens.shape[1]]
        x = self.dropout(x)
        rotary = None if self.position is not None else self._rotary(tokens.shape[1], x)
        for block in self.blocks:
            x = block(x, rotary)
        logits: Tensor = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def _rotary(self, tokens: int, x: Tensor) -> tuple[Tensor, Tensor]:
        half = self.config.head // 2
        rates = 500000.0 ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angles = torch.arange(tokens, device=x.device, dtype=torch.float32)[:, None] * rates
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class _VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, config.mlp_width), nn.Linear(config.mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(*parts.unbind(0))
        x = x + self.out(found.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Images (batch, 3, size, size) and labels (batch) to the mean cross-entropy; without labels the logits."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, config.width, config.patch, config.patch)
        self.summary = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position = nn.Parameter(torch.zeros(1, 1 + (config.image // config.patch) ** 2, config.width))
        self.blocks = nn.ModuleList(_VisionBlock(config) for _ in range(config.layers))
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, config.classes)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.summary.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits if labels is None else F.cross_entropy(logits.float(), labels)


FAMILIES: dict[str, tuple[type[Any], type[nn.Module]]] = {
    "decoder": (DecoderConfig, Decoder),
    "vision": (VisionConfig, VisionTransformer),
}
"""Family to its configuration and its model."""
