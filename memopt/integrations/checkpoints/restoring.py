"""Reading a checkpoint into a model and an optimizer: everything is checked before anything is changed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memopt.integrations.checkpoints.staging import offsets_of
from memopt.integrations.checkpoints.tensor_file import Entry, read_header, read_part
from memopt.integrations.checkpoints.trees import put_together, take_apart
from memopt.integrations.checkpoints.writer import file_of, rank_file_of
from memopt.optim import sharding

SHOWN = 5
FORM: dict[str, type | tuple[type, ...]] = {  # of a rank's file
    "step": int,
    "model": dict,
    "optimizer": (dict, type(None)),
    "extra": object,
    "random": dict,
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model inside DDP's and torch.compile's wrappers."""
    from torch.nn.parallel import DistributedDataParallel

    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names of parameters and buffers that are another one's, with the name under which they are saved."""
    first: dict[int, str] = {}
    tied = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if (owner := first.setdefault(id(tensor), name)) != name:
                tied[name] = owner
    return tied


def random_state() -> dict[str, Tensor]:
    """This process's random states: the CPU's, and its current accelerator's."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def restore(path: Path, rank: int, version: int, model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    """Fill ``model`` and ``optimizer`` from the checkpoint at ``path`` and return the plain values of ``rank``.

    Raises:
        ValueError: damaged, of a later version, saved without an optimizer, or of another model or optimizer.
    """
    own = rank_file_of(path, rank)
    rest = _read_rest(own if own.exists() else rank_file_of(path, 0), version)
    inner = unwrapped(model)
    entries, notes = read_header(file_of(path, "model"))
    weights, _ = take_apart(inner.state_dict())
    tied = {**_read_tied(notes, path), **tied_names(inner)}
    weights = {name: t for name, t in weights.items() if name in entries or name not in tied}
    _compare(weights, entries, "weight", path)
    kept = put_together(rest["model"], weights, file_of(path, "model"))
    if optimizer is not None:
        if rest["optimizer"] is None:
            raise ValueError(f"{path} was saved without an optimizer, nothing loaded: load it without one")
        states = _room_for_states(path, inner, optimizer)
        _fill(file_of(path, "optimizer"), states)
        optimizer.load_state_dict(put_together(rest["optimizer"], states, file_of(path, "optimizer")))
    _fill(file_of(path, "model"), weights, entries)
    of_modules = {name: value for name, value in kept.items() if name.endswith("_extra_state")}
    if of_modules:
        inner.load_state_dict(of_modules, strict=False)
    if own.exists():
        _set_random_state(rest["random"])
    return rest


def _read_rest(path: Path, version: int) -> dict[str, Any]:
    """The plain values of a rank's file, of the form that ``save`` gives them."""
    damaged = f"{path} is damaged or no part of a checkpoint"
    try:
        rest = torch.load(path, weights_only=True)
    except Exception as error:  # any kind: pickled bytes that are not what they were can do anything but run code
        raise ValueError(f"{damaged}: {' '.join(str(error).split())[:300]}") from error
    found = rest.get("version") if isinstance(rest, dict) else None
    if type(found) is not int or not 1 <= found <= version:
        raise ValueError(f"{path} is of version {found!r}; this memopt reads versions 1 to {version}")
    wrong = sorted(name for name, kind in FORM.items() if name not in rest or not isinstance(rest[name], kind))
    if wrong:
        raise ValueError(f"{damaged}: {', '.join(wrong)} in it: missing, or not of the kind that a save writes")
    try:
        torch.Generator().set_state(rest["random"]["cpu"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{damaged}: its random state cannot be used ({error})") from error
    return cast("dict[str, Any]", rest)


def _read_tied(notes: Mapping[str, str], path: Path) -> dict[str, str]:
    """Names of weights that are saved under another name, out of the header's notes."""
    try:
        tied = json.loads(notes.get("tied", "{}"))
    except ValueError:
        tied = None
    if not isinstance(tied, dict):
        raise ValueError(f"{file_of(path, 'model')} is damaged: its note on tied weights is {notes['tied']!r:.100}")
    return tied


def _room_for_states(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Empty tensors for the stored states, sharded as the optimizer shards them."""
    if not file_of(path, "optimizer").exists():
        return {}
    entries, _ = read_header(file_of(path, "optimizer"))
    if not any(sharding.is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
        return {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    if not optimizer.state:
        get_optimizer_state_dict(model, optimizer)  # makes the states, by a step of no length
    states, _ = take_apart(optimizer.state_dict())
    _compare(states, entries, "optimizer state", path)
    return {name: torch.empty_like(tensor) for name, tensor in states.items()}


def _compare(tensors: Mapping[str, Tensor], entries: Mapping[str, Entry], what: str, path: Path) -> None:
    problems = [f"no {what} {name!r} in the checkpoint" for name in tensors.keys() - entries.keys()]
    problems += [f"{what} {name!r} only in the checkpoint" for name in entries.keys() - tensors.keys()]
    for name in tensors.keys() & entries.keys():
        entry, tensor = entries[name], tensors[name]
        if entry.shape != tuple(tensor.shape) or entry.dtype != tensor.dtype:
            problems.append(
                f"{what} {name!r} is {entry.dtype} {entry.shape} in the checkpoint, here {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(f"{path} does not fit, nothing loaded: {'; '.join(sorted(problems)[:SHOWN])}{more}")


def _fill(path: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, Entry] | None = None) -> None:
    """Read each tensor's local part from the file."""
    if not tensors:
        return
    entries = read_header(path)[0] if entries is None else entries
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for name, tensor in tensors.items():
            local = sharding.local_of(tensor)
            direct = local.device.type == "cpu" and local.is_contiguous()
            part = local if direct else torch.empty(local.shape, dtype=local.dtype)
            read_part(descriptor, entries[name], part, offsets_of(tensor))
            if not direct:
                local.copy_(part)
    finally:
        os.close(descriptor)
