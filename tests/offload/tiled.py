"""A transformer whose MLPs are modules that can run in tiles, and those tiles without a plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.nn import functional as F

from memopt.offload import tile
from memopt.planner.values import Tile


class Mlp(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(width, 4 * width, bias=False),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))


class Layer(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out, self.mlp = nn.Linear(width, 3 * width), nn.Linear(width, width), Mlp(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, layers: int = 2, width: int = 64, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, dropout) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


TILES = tuple(Tile(f"layers.{n}.mlp", 4, 1) for n in range(2))


@contextmanager
def by_hand(model: nn.Module, x: Tensor, tiles: tuple[Tile, ...] = TILES) -> Iterator[None]:
    """These modules in tiles, as a plan would run them that keeps everything."""
    with ExitStack() as stack:
        for one in tiles:
            module = model.get_submodule(one.path)
            stack.enter_context(tile(module, one.chunks, inputs=(x,), dim=one.dim, recompute=False))
        yield
