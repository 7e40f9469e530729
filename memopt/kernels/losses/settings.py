"""The static choices of a vocabulary loss, checked once, and what it returns beside the loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REDUCTIONS = ("mean", "sum", "none")
MODES = ("rows", "recompute", "tiles")
ACCUMULATIONS = ("once", "weight", "float32")
# Products of 343 or 902 rows cost up to a third more per row than those of 320 or 896, and those up to 7 % more than
# products of a multiple of 256 (measured on AVX-512 in bfloat16).
ROW_UNIT, LARGE_UNIT = 64, 256
DEFAULT_CHUNK_BYTES = 90 * 2**20  # with what surrounds it a call stays below 96 MiB


class LossStats(NamedTuple):
    """What :func:`memopt.linear_cross_entropy` knows beside the loss; zero at ignored positions.

    log_sum_exp: per position, float32, differentiable.
    entropy: of the predicted distribution per position, in nats.
    accuracy: share of the counted positions whose largest logit is the target's (for soft targets: the target's
        largest probability), a scalar.
    """

    log_sum_exp: Tensor
    entropy: Tensor
    accuracy: Tensor


@dataclass(frozen=True)
class Settings:
    """How the loss is computed; no tensors. ``length`` is that of the dimension along which ``shift`` moves targets."""

    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    softcap: float = 0.0
    z_loss: float = 0.0
    shift: int = 0
    length: int = 1
    want_stats: bool = False
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    mode: str = "rows"
    accumulate: str = "once"
    gradient_filter: float = 0.0
    group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        for name in ("ignore_index", "shift", "chunk_bytes"):
            check_number(name, getattr(self, name), whole=True)
        for name in ("label_smoothing", "softcap", "z_loss", "gradient_filter"):
            check_number(name, getattr(self, name))
        if not isinstance(self.want_stats, bool):
            raise TypeError(f"return_stats must be True or False, got {self.want_stats!r}")
        for name, value, choices in (
            ("reduction", self.reduction, REDUCTIONS),
            ("mode", self.mode, MODES),
            ("accumulate", self.accumulate, ACCUMULATIONS),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing}")
        for name, number in (("softcap", self.softcap), ("z_loss", self.z_loss)):
            if not 0.0 <= number < float("inf"):
                raise ValueError(f"{name} must be a finite number, not negative, got {number}")
        if not 0.0 <= self.gradient_filter < 1.0:
            raise ValueError(f"gradient_filter must lie in [0, 1), got {self.gradient_filter}")
        if self.gradient_filter and self.mode != "tiles":
            raise ValueError(f"gradient_filter works in mode='tiles' only, got mode={self.mode!r}")
        if self.chunk_bytes <= 0:
            raise ValueError(f"chunk_bytes must be positive, got {self.chunk_bytes}")
        if self.shift < 0 or self.shift > self.length:
            raise ValueError(f"shift must lie between 0 and the sequence length {self.length}, got {self.shift}")

    def choices(self) -> tuple[Any, ...]:
        """All but the process group, as the registered operators take them."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.name != "group")

    @property
    def early(self) -> bool:
        """Whether forward can make gradients: they are known up to one number, and the mode keeps logits for it."""
        return self.reduction != "none" and self.mode != "tiles"

    @property
    def recomputes(self) -> bool:
        """Whether backward may have to make logits again, so that it needs the inputs."""
        return not self.early or self.mode == "recompute" or self.want_stats


def check_number(name: str, value: object, *, whole: bool = False) -> None:
    """TypeError unless ``value`` is a number, or a whole one; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        expected = "a whole number" if whole else "a number"
        raise TypeError(f"{name} must be {expected}, got {value!r} of type {type(value).__name__}")


def rows_per_chunk(rows: int, bytes_per_row: int, chunk_bytes: int) -> int:
    """How many rows a chunk holds so that all chunks are about equal and none needs more than ``chunk_bytes``."""
    if rows == 0:
        return 1
    largest = whole_units(max(1, chunk_bytes // max(1, bytes_per_row)))
    chunks = -(-rows // largest)
    even = -(-rows // chunks)
    return min(largest, even + -even % (LARGE_UNIT if largest >= LARGE_UNIT else ROW_UNIT))


def whole_units(rows: int) -> int:
    """``rows`` rounded down to a multiple of LARGE_UNIT, of ROW_UNIT if there is less than that, else as it is."""
    for unit in (LARGE_UNIT, ROW_UNIT):
        if rows >= unit:
            return rows - rows % unit
    return rows


def even_chunks(rows: int, bytes_per_row: int, chunk_bytes: int) -> Iterator[slice]:
    """Consecutive chunks of :func:`rows_per_chunk` rows."""
    step = rows_per_chunk(rows, bytes_per_row, chunk_bytes)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))
