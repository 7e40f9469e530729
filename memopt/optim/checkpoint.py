"""State dicts: what they carry, and the checks that stand between a state dict and an optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from memopt.kernels import State
from memopt.optim import sharding
from memopt.optim.owner import Owner
from memopt.optim.slot import Slot

VERSION = 1
HEADER = ("rule", "version", "skipped_steps")
OWN_OPTIONS = ("state", "param_rounding", "seed", "skip_nonfinite")
_OF_OTHERS = ("initial_lr", "param_names")  # what schedulers and torch itself add to groups


def header(rule: str) -> dict[str, Any]:
    """What every parameter group says about itself, in memory and in state dicts."""
    return {"rule": rule, "version": VERSION, "skipped_steps": 0}


def export(optimizer: Owner, packed: dict[str, Any]) -> dict[str, Any]:
    """torch's state dict of the optimizer with step counts as tensors, and the shape of each low-bit parameter."""
    owners = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for key, stored in packed["state"].items():
        group, param = owners[key]
        entry = optimizer.slot(key, group, param, stored).shown() if sharding.is_sharded(param) else dict(stored)
        if "step" in entry:
            entry["step"] = torch.tensor(float(entry["step"]))
            if any(name.endswith("_codes") for name in entry):
                entry["shape"] = torch.tensor(tuple(param.shape), dtype=torch.int64)
        state[key] = entry
    return {**packed, "state": state}


def read(
    optimizer: Owner, incoming: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], defaultdict[Tensor, dict[str, Any]]]:
    """The groups and states of a state dict as the optimizer would hold them; it is not changed.

    Raises:
        ValueError: the state dict does not fit; the message says what differs.
    """
    _check_form(incoming)
    saved_groups = incoming["param_groups"]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"the state dict has groups of {saved_sizes} parameters, this optimizer of {sizes}; nothing loaded"
        )
    problems: list[str] = []
    groups = []
    for i, (own, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        problems += [f"group {i}: {text}" for text in _differences(optimizer, own, saved)]
        groups.append(_merge(own, saved))
    if problems:
        raise ValueError(_message(problems))
    for group in groups:
        optimizer._check_options(group)
    known = {key for saved in saved_groups for key in saved["params"]}
    strangers = [key for key in incoming["state"] if key not in known]
    if strangers:
        problems.append(f"it holds states of {strangers[0]!r}, which is in none of its groups")
    state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    number = 0
    for group, saved in zip(groups, saved_groups, strict=True):
        for key, param in zip(saved["params"], group["params"], strict=True):
            stored = incoming["state"].get(key)
            if stored:
                try:
                    state[param] = _restore(optimizer.slot(number, group, param, {}), stored, optimizer.optional)
                except ValueError as error:
                    problems.append(f"parameter {number}: {error}")
            number += 1
    if problems:
        raise ValueError(_message(problems))
    return groups, state


def _check_form(incoming: Mapping[str, Any]) -> None:
    """Refuses what no optimizer's ``state_dict()`` returns."""
    advice = "it must be what an optimizer's state_dict() returned"
    for part in ("state", "param_groups"):
        if part not in incoming:
            raise ValueError(f"the state dict has no {part!r}; {advice}")
    groups, state = incoming["param_groups"], incoming["state"]
    if not isinstance(groups, (list, tuple)) or not all(isinstance(g, Mapping) and "params" in g for g in groups):
        raise ValueError(f"param_groups of the state dict is no list of groups with 'params'; {advice}")
    if not isinstance(state, Mapping) or not all(isinstance(stored, Mapping) for stored in state.values()):
        raise ValueError(f"state of the state dict is no mapping of parameters to their states; {advice}")


def _message(problems: list[str]) -> str:
    shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
    return f"the state dict does not fit this optimizer, nothing loaded: {shown}"


def _differences(optimizer: Owner, own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    found = []
    if "rule" in saved:
        if saved["rule"] != own["rule"]:
            found.append(f"it is of rule {saved['rule']!r}, this optimizer is {own['rule']!r}")
        version = saved.get("version")
        if not isinstance(version, int) or not 0 < version <= VERSION:
            found.append(f"it is of version {version!r}, this memopt reads up to {VERSION}")
        if saved.get("state") != own["state"]:
            found.append(
                f"its format is {saved.get('state')!r}, this optimizer's {own['state']!r} "
                "(memopt.optim.convert changes it)"
            )
    return found


def _merge(own: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved options over our own; of another library's groups only those that mean something here."""
    ours = "rule" in saved
    kept = {k: deepcopy(v) for k, v in saved.items() if k != "params" and (ours or k in own or k in _OF_OTHERS)}
    return {**own, **kept, "params": own["params"]}


def _restore(slot: Slot, stored: Mapping[str, Any], optional: tuple[State, ...]) -> dict[str, Any]:
    """One parameter's states, copied into the slot's format and device; plain ones are encoded where needed."""
    taken = {"step", "shape"}
    for spec in (*slot.specs, *slot.idle):
        kept_by, extent = slot.kept(spec)
        plain = stored.get(spec.name)
        absent = all(stored.get(key) is None for key in (spec.name, *kept_by.keys(spec)))
        if absent and spec in optional:  # switched off, or on since the last step
            continue
        slot.write(spec, 0.0)
        if isinstance(plain, Tensor):
            value = slot.taken(spec, spec.name, plain)
            _expect(spec.name, value, extent.local, None)
            slot.write(spec, torch.empty_like(slot.blank(spec), dtype=torch.float32).copy_(value))
            taken.add(spec.name)
            continue
        for key in kept_by.keys(spec):
            found, target = stored.get(key), slot.held[key]
            if not isinstance(found, Tensor):
                raise ValueError(f"it has no {key}")
            value = slot.taken(spec, key, found)
            _expect(key, value, tuple(target.shape), target.dtype)
            target.copy_(value)
            taken.add(key)
    left = sorted(key for key in stored if key not in taken and stored[key] is not None)
    if left:
        raise ValueError(f"it holds {', '.join(left)}, which this optimizer does not keep")
    shape = stored.get("shape")
    if isinstance(shape, Tensor) and tuple(shape.tolist()) != slot.shape:
        raise ValueError(f"it is of shape {tuple(shape.tolist())}, this parameter of {slot.shape}")
    slot.stored["step"] = _step(stored.get("step", 1))
    return slot.stored


def _step(found: Any) -> int:
    single = isinstance(found, (int, float)) or (isinstance(found, Tensor) and found.numel() == 1)
    if not single or not 0 <= float(found) < 2**53 or float(found) % 1:
        raise ValueError(f"its step is {found!r}, not a number of steps")
    return int(found)


def _expect(name: str, found: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    if tuple(found.shape) != shape or (dtype is not None and found.dtype != dtype):
        wanted = f"of shape {shape}" + (f" and {dtype}" if dtype is not None else "")
        raise ValueError(f"{name} is {found.dtype} of shape {tuple(found.shape)}; this parameter's must be {wanted}")
