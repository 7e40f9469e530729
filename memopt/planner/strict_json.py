"""Frozen dataclasses to JSON and back, where an unknown, missing or mistyped field is an error that names it."""

from __future__ import annotations

import json
import math
import os
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """What a JSON file holds, as plain values.

    Args:
        path: the file.
        what: how error messages call it, such as "plan file".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, is no UTF-8 text, no JSON, or nested deeper than Python's parser goes.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{what} {os.fspath(path)!r} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits, too deep
        raise ValueError(f"{what} {os.fspath(path)!r} is not JSON: {error}") from error


def to_json(value: Any) -> Any:
    """Turn a dataclass of plain values into what ``json.dumps`` takes; enums become their values."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[T], value: Any, where: str) -> T:
    """Build ``kind`` from parsed JSON, strictly.

    Args:
        kind: a dataclass of int, float, str, bool, enums, optionals, tuples, string-keyed dicts and dataclasses.
        value: what ``json.load`` returned.
        where: how error messages call the outermost value.

    Raises:
        ValueError: a field is unknown, missing, of the wrong type or not finite; the message gives its path.
    """
    result: T = _read(kind, value, where)
    return result


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _read_union(parts, value, where)
    if origin is tuple:
        return _read_tuple(parts, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise _mistyped(where, "an object", value)
        return {key: _read(parts[1], item, f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if isinstance(kind, type) and issubclass(kind, Enum):
        choices = [member.value for member in kind]
        if value not in choices:
            raise ValueError(f"{where} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
        return kind(value)
    return _read_scalar(kind, value, where)


def _read_union(parts: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in parts:
        return None
    others = [part for part in parts if part is not type(None)]
    for part in others:
        if part in (int, float, str, bool) and type(value) is part:
            return value
    return _read(others[0], value, where)


def _read_tuple(parts: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _mistyped(where, "a list", value)
    if len(parts) == 2 and parts[1] is Ellipsis:
        return tuple(_read(parts[0], item, f"{where}[{n}]") for n, item in enumerate(value))
    if len(value) != len(parts):
        raise ValueError(f"{where} has {len(value)} entries; it must have {len(parts)}")
    return tuple(_read(part, item, f"{where}[{n}]") for n, (part, item) in enumerate(zip(parts, value, strict=True)))


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _mistyped(where, "an object", value)
    known = {f.name: f for f in fields(kind)}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}; the fields are {', '.join(sorted(known))}")
    for name, f in known.items():
        if name not in value and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where} lacks the field {name!r}")
    hints = _hints(kind)
    return kind(**{name: _read(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _read_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(f"{where} is {number}; it must be a finite number")
        return number
    if type(value) is not kind:
        raise _mistyped(where, {int: "an integer", float: "a number", str: "text", bool: "true or false"}[kind], value)
    return value


def _mistyped(where: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{where} is {value!r}; it must be {expected}")
