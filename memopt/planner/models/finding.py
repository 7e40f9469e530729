"""Models by name: presets kept as data, transformers configurations, and a user's own Python function."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memopt.planner.models.reference_models import FAMILIES
from memopt.planner.models.transformers_configs import build_from_config
from memopt.planner.naming import unknown, users_line
from memopt.planner.strict_json import read_json

_FOLDER = "models"
_MOST = 2**40  # sequences, or tokens in one
_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


class ModelError(ValueError):
    """A model that is not known, or a description of one that cannot be used."""


@dataclass(frozen=True)
class FoundModel:
    """A model without weights, and one batch for it.

    Attributes:
        name: of the preset, the file's folder, or the function.
        model: on the meta device, unless it is the user's own.
        inputs: one batch, as keyword arguments or as the user gave it.
        loss_fn: makes the loss of the model's output; None: the model does so itself.
    """

    name: str
    model: nn.Module
    inputs: Any
    loss_fn: Callable[..., Any] | None = None


def preset_names() -> tuple[str, ...]:
    """The names of the presets, sorted."""
    folder = resources.files("memopt.presets").joinpath(_FOLDER)
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


def find_model(
    name: str | os.PathLike[str], batch: int = 1, tokens: int | None = None, dtype: str = "bf16"
) -> FoundModel:
    """Builds a model on the meta device, which takes a second or two and no memory, with a batch for one step.

    Args:
        name: a preset (``preset_names()``), a transformers ``config.json`` or a folder with one, or ``module:callable``
            for a function without arguments that returns (model, inputs) or (model, inputs, loss_fn).
        batch: sequences or images.
        tokens: length of the sequences; default: the model's own context, at most 4096. Not for vision models.
        dtype: of parameters and activations: bf16, fp16 or fp32. Not for ``module:callable``.

    Raises:
        ModelError: nothing of that name, a file that cannot be used, or sizes that the model does not have.
    """
    text = os.fspath(name)
    if dtype not in _DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; choose bf16, fp16 or fp32")
    for what, size in (("batch", batch), ("seq", tokens)):
        if size is not None and not 1 <= size <= _MOST:
            raise ModelError(f"{what} must be from 1 to {_MOST}, not {size}")
    if text.lower() in preset_names():
        with _on_meta(_DTYPES[dtype]):
            return _from_preset(text.lower(), batch, tokens)
    path = Path(text)
    if text and (path.is_dir() or path.suffix == ".json"):
        with _on_meta(_DTYPES[dtype]):
            return _from_config(path, batch, tokens)
    if is_function(text):
        return _from_python(text)
    raise ModelError(
        unknown("model", text, preset_names(), ", a transformers config.json or its folder, or module:callable")
    )


def is_function(name: str) -> bool:
    """Whether a model's name is ``module:callable``, so that the user's own code makes its batch."""
    path = Path(name)
    return ":" in name and name.lower() not in preset_names() and not path.is_dir() and path.suffix != ".json"


@contextmanager
def _on_meta(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def _from_preset(name: str, batch: int, tokens: int | None) -> FoundModel:
    source = resources.files("memopt.presets").joinpath(_FOLDER).joinpath(f"{name}.json")
    described = json.loads(source.read_text(encoding="utf-8"))
    make_config, make_model = FAMILIES[described["family"]]
    config = make_config(**described["config"])
    return FoundModel(name, make_model(config), _batch(described["family"], config, batch, tokens))


def _batch(family: str, config: Any, batch: int, tokens: int | None) -> dict[str, Tensor]:
    if family == "vision":
        if tokens is not None:
            raise ModelError("seq is for language models; this one takes images of a fixed size")
        images = torch.empty(batch, 3, config.image, config.image)
        return {"images": images, "labels": torch.empty(batch, dtype=torch.long)}
    length = min(config.context, 4096) if tokens is None else tokens
    if config.positions == "learned" and length > config.context:
        raise ModelError(f"seq {length} is more than this model's {config.context} learned positions")
    return {name: torch.empty(batch, length, dtype=torch.long) for name in ("tokens", "targets")}


def _from_config(path: Path, batch: int, tokens: int | None) -> FoundModel:
    file = path / "config.json" if path.is_dir() else path
    try:
        values = read_json(file, "model file")
    except FileNotFoundError:
        raise ModelError(f"model file {str(file)!r} does not exist") from None
    except ValueError as error:
        raise ModelError(str(error)) from error
    try:
        model, inputs = build_from_config(values, batch, tokens)
    except ValueError as error:
        raise ModelError(f"model file {str(file)!r}: {error}") from error
    return FoundModel(values.get("_name_or_path") or path.resolve().stem, model, inputs)


def _from_python(text: str) -> FoundModel:
    module_name, _, function_name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    function = _imported(text, module_name, function_name)
    try:
        found = function()
    except (Exception, SystemExit) as error:
        raise ModelError(f"{text} failed: {_told(error)}") from error
    if not isinstance(found, tuple) or len(found) not in (2, 3) or not isinstance(found[0], nn.Module):
        raise ModelError(f"{text} must return (model, inputs) or (model, inputs, loss_fn), not {type(found).__name__}")
    return FoundModel(text, *found)


def _imported(text: str, module_name: str, function_name: str) -> Callable[[], Any]:
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ModelError(f"cannot import {module_name!r} for model {text!r}: {error}") from error
    except (Exception, SystemExit) as error:
        raise ModelError(f"cannot import {module_name!r} for model {text!r}: {_told(error)}") from error
    try:
        function = getattr(module, function_name)
    except AttributeError:
        raise ModelError(f"module {module_name!r} has no {function_name!r}") from None
    if not callable(function):
        raise ModelError(f"{text} is a {type(function).__name__}; it must be a function without arguments")
    made: Callable[[], Any] = function
    return made


def _told(error: BaseException) -> str:
    """The error and the line of the user's that it comes from."""
    where = users_line(error.__traceback__)
    return f"{type(error).__name__}: {error}{f' (at {where})' if where else ''}"
