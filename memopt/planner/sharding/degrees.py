"""How a step is spread over devices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Degrees:
    """How a step is spread: devices along data, tensor and context, and the ZeRO stage (0 to 3).

    Stage 3 counts what FSDP2 (``fully_shard`` of every block and then of the model) holds.
    """

    data: int = 1
    tensor: int = 1
    context: int = 1
    zero: int = 0

    def __post_init__(self) -> None:
        for name in ("data", "tensor", "context"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of devices, at least 1, not {value!r}")
        if isinstance(self.zero, bool) or self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero must be 0, 1, 2 or 3, not {self.zero!r}")

    @property
    def devices(self) -> int:
        """Devices in all."""
        return self.data * self.tensor * self.context
