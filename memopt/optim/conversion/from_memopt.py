"""memopt's own optimizers, of any format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.optim import sharding
from memopt.optim.checkpoint import HEADER, OWN_OPTIONS
from memopt.optim.conversion.codes import Shared, shared_codes
from memopt.optim.conversion.plain import Library, StateDict, mapped, step_tensor
from memopt.optim.formats import get_format
from memopt.optim.registry import rules_by_name
from memopt.optim.slot import Slot


def _slots(state_dict: Mapping[str, Any], rule: str) -> Iterator[tuple[Any, Slot]]:
    """(key, slot) of each parameter; the shape that decides its layout is stored with it.

    Raises:
        ValueError: the state dict is not of this rule, or holds codes in parts on several ranks.
    """
    groups = {key: group for group in state_dict.get("param_groups", ()) for key in group["params"]}
    found = {group.get("rule") for group in groups.values()}
    if found != {rule}:
        raise ValueError(f"the state dict is not one of memopt's {rule!r}: its groups say {sorted(map(str, found))}")
    reader = rules_by_name()[rule]([torch.zeros(1, device="meta")])
    for key, stored in mapped(state_dict, dict)["state"].items():
        if "shape" in stored and any(map(sharding.is_sharded, filter(torch.is_tensor, stored.values()))):
            raise ValueError(
                f"parameter {key} of the state dict is sharded; convert the full one, which get_optimizer_state_dict "
                "returns with StateDictOptions(full_state_dict=True)"
            )
        shapes = [tuple(v.shape) for k, v in stored.items() if isinstance(v, Tensor) and k != "step"]
        shape = tuple(stored["shape"].tolist()) if "shape" in stored else (shapes or [()])[0]
        yield key, reader.slot(0, groups[key], torch.empty(shape, device="meta"), stored)


def read(state_dict: Mapping[str, Any], rule: str) -> StateDict:
    """Every state decoded; what only memopt's groups hold is left out."""
    plain = mapped(state_dict, dict)
    for key, slot in _slots(state_dict, rule):
        decoded = {spec.name: slot.decode(spec) for spec in slot.specs}
        plain["state"][key] = {"step": step_tensor(slot.stored["step"]), **decoded}
    for group in plain["param_groups"]:
        for name in (*HEADER, *OWN_OPTIONS):
            group.pop(name, None)
    return plain


def codes(state_dict: Mapping[str, Any], rule: str) -> Shared:
    """The codes of ``8bit-dynamic`` where their blocks are those of the flattened parameter."""
    return {key: shared_codes(slot) for key, slot in _slots(state_dict, rule)}


def write(plain: StateDict, rule: str, bits: int) -> StateDict:
    """The plain form with memopt's header: the format is fp32, 8bit or 4bit by ``bits``."""
    chosen = {32: "fp32", 16: "bf16", 8: "8bit", 4: "4bit"}[bits]
    optimizer_class = rules_by_name()[rule]
    state: dict[Any, Any] = {}
    groups = []
    for group in plain["param_groups"]:
        params = []
        for key in group["params"]:
            stored = plain["state"].get(key) or {}
            shapes = [tuple(v.shape) for k, v in stored.items() if isinstance(v, Tensor) and k != "step"]
            params.append(torch.zeros(shapes[0] if shapes else ()))
        optimizer = optimizer_class(params, state=get_format(chosen))
        local = {i: plain["state"][key] for i, key in enumerate(group["params"]) if plain["state"].get(key)}
        optimizer.load_state_dict({"state": local, "param_groups": [{**group, "params": list(range(len(params)))}]})
        written = optimizer.state_dict()
        state.update({group["params"][i]: stored for i, stored in written["state"].items()})
        groups.append({**written["param_groups"][0], "params": group["params"]})
    return {"state": state, "param_groups": groups}


LIBRARY = Library("memopt", read, write, codes)
