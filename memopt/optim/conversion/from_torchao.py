"""torchao.optim: states are tensor subclasses in 8 or 4 bits, or fp8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.optim.conversion.codes import BLOCK, Codes, Shared
from memopt.optim.conversion.plain import Library, StateDict, mapped, step_tensor

_BLOCKS = {8: 256, 4: 128}
_MIN_LOW_BIT_SIZE = 4096


def _plain(value: Any) -> Tensor:
    decode = getattr(value, "dequantize", None)
    if type(value) is not Tensor and decode is not None:
        value = decode()
    return value.float()  # type: ignore[no-any-return]


def read(state_dict: Mapping[str, Any], rule: str) -> StateDict:
    """Every state decoded, exactly."""

    def entry(stored: Mapping[str, Any]) -> dict[str, Any]:
        states = {name: _plain(value) for name, value in stored.items() if name != "step"}
        return {"step": step_tensor(stored["step"]), **states} if stored else {}

    plain = mapped(state_dict, entry)
    for group in plain["param_groups"]:
        if isinstance(group.get("lr"), Tensor):
            group["lr"] = float(group["lr"])
    return plain


def codes(state_dict: Mapping[str, Any], rule: str) -> Shared:
    """The codes of 8-bit states as they are."""

    def held(value: Any) -> Codes | None:
        levels = getattr(value, "qmap", None)
        if levels is None or levels.numel() != 256 or getattr(value, "block_size", 0) != BLOCK:
            return None
        return Codes(value.codes, value.scale, levels)

    found = {key: {name: held(value) for name, value in stored.items()} for key, stored in state_dict["state"].items()}
    return {key: {name: one for name, one in states.items() if one is not None} for key, states in found.items()}


def put(written: StateDict, shared: Shared, rule: str) -> None:
    """The codes that are of torchao's own map, in the place of those made from decoded values."""
    for key, entry in written["state"].items():
        for name, given in shared.get(key, {}).items():
            ours = getattr(entry.get(name), "qmap", None)
            if ours is not None and torch.equal(ours, given.levels):
                entry[name].codes.copy_(given.codes)
                entry[name].scale.copy_(given.scales)


def write(plain: StateDict, rule: str, bits: int) -> StateDict:
    """States in torchao's format of 8 or 4 bits where it would use it (4096 elements in whole blocks), else in fp32."""
    if bits not in (4, 8, 32):
        raise ValueError(f"torchao keeps states in 4, 8 or 32 bits, not {bits}")

    def encoded(name: str, value: Tensor) -> Tensor:
        if bits == 32 or value.numel() < _MIN_LOW_BIT_SIZE or value.numel() % _BLOCKS[bits]:
            return value.clone()
        from torchao.optim.subclass_4bit import OptimState4bit
        from torchao.optim.subclass_8bit import OptimState8bit

        kind = OptimState8bit if bits == 8 else OptimState4bit
        fresh: Tensor = kind.zeros(value.shape, signed=name == "exp_avg", block_size=_BLOCKS[bits], device=value.device)
        return fresh.copy_(value)

    def entry(stored: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value if name == "step" else encoded(name, value) for name, value in stored.items()}

    written = mapped(plain, entry)
    for group in written["param_groups"]:
        group["lr"] = torch.tensor(float(group["lr"]))
    return written


LIBRARY = Library("torchao", read, write, codes, put)
