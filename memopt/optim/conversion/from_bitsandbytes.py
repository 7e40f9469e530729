"""bitsandbytes: ``state1`` and ``state2``, in fp32 or as codes of a map with one scale per 256 elements.

Written for bitsandbytes 0.44 and newer (blocks of 256, maybe nested under a key that hides them from FSDP).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.optim.conversion.codes import Codes, Shared
from memopt.optim.conversion.plain import Library, StateDict, mapped, step_tensor

_NESTED = "__bnb_optimizer_quant_state__"
_BLOCK = 256
_MIN_LOW_BIT_SIZE = 4096

# memopt's rule: what state1 and state2 are called; two names for one: they are stacked along a new first dimension.
_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "adam": (("exp_avg",), ("exp_avg_sq",)),
    "adamw": (("exp_avg",), ("exp_avg_sq",)),
    "lamb": (("exp_avg",), ("exp_avg_sq",)),
    "ademamix": (("exp_avg", "exp_avg_slow"), ("exp_avg_sq",)),
    "lion": (("exp_avg",),),
    "sgd": (("momentum_buffer",),),
    "lars": (("momentum_buffer",),),
    "rmsprop": (("square_avg",),),
    "adagrad": (("sum",),),
}


def _names(rule: str) -> tuple[tuple[str, ...], ...]:
    if rule not in _NAMES:
        raise ValueError(f"bitsandbytes has no rule {rule!r}; it has {', '.join(sorted(_NAMES))}")
    return _NAMES[rule]


def _decoded(stored: Mapping[str, Any], number: int) -> Tensor:
    values: Tensor = stored[f"state{number}"]
    if values.dtype != torch.uint8:
        return values.float()
    one = values if values.dim() and stored[f"absmax{number}"].dim() == 1 else values.flatten(1)
    scales = stored[f"absmax{number}"].float()
    looked_up = stored[f"qmap{number}"].float()[one.long()].reshape(*scales.shape[:-1], -1)
    decoded: Tensor = looked_up * scales.repeat_interleave(_BLOCK, -1)[..., : looked_up.shape[-1]]
    return decoded.reshape(values.shape)


def _fields(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in stored.items() if k != _NESTED}, **stored.get(_NESTED, {})}


def read(state_dict: Mapping[str, Any], rule: str) -> StateDict:
    """Every state decoded, exactly."""

    def entry(stored: Mapping[str, Any]) -> dict[str, Any]:
        flat = _fields(stored)
        if not flat:
            return {}
        plain: dict[str, Any] = {"step": step_tensor(flat["step"])}
        for number, names in enumerate(_names(rule), 1):
            value = _decoded(flat, number)
            parts = value.unbind(0) if len(names) > 1 else (value,)
            plain.update({name: part.clone() for name, part in zip(names, parts, strict=True)})
        return plain

    plain = mapped(state_dict, entry)
    for group in plain["param_groups"]:
        if rule in ("sgd", "lars"):  # bitsandbytes keeps the momentum among the betas
            group["momentum"] = group.pop("betas")[0]
        if rule not in ("ademamix",):
            for name in ("alpha", "t_alpha", "t_beta3"):
                group.pop(name, None)
    return plain


def codes(state_dict: Mapping[str, Any], rule: str) -> Shared:
    """The 8-bit codes as they are."""
    found: Shared = {}
    for key, stored in state_dict["state"].items():
        flat, found[key] = _fields(stored), {}
        for number, names in enumerate(_names(rule), 1):
            if f"qmap{number}" not in flat:
                continue
            values, scales, levels = (flat[f"{field}{number}"] for field in ("state", "absmax", "qmap"))
            parts = zip(values, scales, strict=True) if len(names) > 1 else [(values, scales.flatten())]
            found[key] |= {
                name: Codes(values, scales.float(), levels.float())
                for name, (values, scales) in zip(names, parts, strict=True)
            }
    return found


def put(written: StateDict, shared: Shared, rule: str) -> None:
    """The codes that are of bitsandbytes' own map, in the place of those made from decoded values."""
    for key, entry in written["state"].items():
        for number, names in enumerate(_names(rule), 1):
            given = [shared[key][name] for name in names if name in shared.get(key, {})]
            qmap = entry.get(f"qmap{number}")
            if qmap is None or len(given) < len(names) or not all(torch.equal(qmap, one.levels) for one in given):
                continue
            for field, parts in (("state", [c.codes for c in given]), ("absmax", [c.scales for c in given])):
                entry[f"{field}{number}"] = torch.stack(parts) if len(names) > 1 else parts[0].clone()


def write(plain: StateDict, rule: str, bits: int) -> StateDict:
    """States in fp32 (``bits=32``), or rounded to nearest in bitsandbytes' 8-bit maps where it would use 8 bits."""
    if bits not in (8, 32):
        raise ValueError(f"bitsandbytes keeps states in 8 or 32 bits, not {bits}")

    def entry(stored: Mapping[str, Any]) -> dict[str, Any]:
        if not stored:
            return {}
        written: dict[str, Any] = {"step": int(stored["step"])}
        for number, names in enumerate(_names(rule), 1):
            parts = [stored[name] for name in names]
            low = bits == 8 and parts[0].numel() >= _MIN_LOW_BIT_SIZE
            fields = (
                [_encoded(part, signed=number == 1) for part in parts]  # of RMSprop and Adagrad too
                if low
                else []
            )
            if low:
                joined = {
                    k: torch.stack([f[k] for f in fields]) if len(fields) > 1 else fields[0][k] for k in fields[0]
                }
                written[f"qmap{number}"] = fields[0]["qmap"]
                written[f"state{number}"], written[f"absmax{number}"] = joined["codes"], joined["absmax"]
            else:
                written[f"state{number}"] = torch.stack(parts) if len(parts) > 1 else parts[0].clone()
        return written

    written = mapped(plain, entry)
    for group in written["param_groups"]:
        if "momentum" in group and "betas" not in group:
            group["betas"] = (group["momentum"], 0)
        for name, default in (("eps", 0.0), ("alpha", 0.0), ("t_alpha", None), ("t_beta3", None)):
            group.setdefault(name, default)
    return written


def _encoded(value: Tensor, *, signed: bool) -> dict[str, Tensor]:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    qmap = functional.create_dynamic_map(signed=signed).to(value.device)
    codes, state = functional.quantize_blockwise(value.contiguous().float(), code=qmap, blocksize=_BLOCK)
    return {"codes": codes, "absmax": state.absmax.float(), "qmap": qmap}


LIBRARY = Library("bitsandbytes", read, write, codes, put)
