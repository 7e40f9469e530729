"""Prints symbolic operands as Triton, and turns printed kernels into functions Triton can compile."""

from __future__ import annotations

import functools
import hashlib
import linecache
import math
from types import SimpleNamespace
from typing import Any

from memopt.kernels.codecs import Codec
from memopt.kernels.expr import Expr, element

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==",
          "ne": "!=", "and": "&", "or": "|"}  # fmt: skip
_CALLS = {
    "neg": "-({})",
    "not": "~({})",
    "sqrt": "tl.sqrt({})",
    "rsqrt": "tl.rsqrt({})",
    "rough_sqrt": "tl.sqrt({})",
    "root4": "tl.sqrt(tl.sqrt({}))",
    "abs": "tl.abs({})",
    "sign": "sign_of({})",
    "floor": "tl.floor({})",
    "exp": "tl.exp({})",
    "log": "tl.log({})",
    "exponent": "exponent_of({})",
    "power_of_two": "power_of_two({})",
    "minimum": "tl.minimum({}, {})",
    "maximum": "tl.maximum({}, {})",
    "copysign": "copy_sign({}, {})",
    "where": "tl.where({}, {}, {})",
    "fma": "tl.fma({}, {}, {})",
    "step_down": "step_down({}, {})",
}


class Printer:
    """Turns expressions into statements; each node once. Tables of ``take`` are collected in one float32 array."""

    def __init__(self, prefix: str, tables: list[float]) -> None:
        self.prefix, self.tables = prefix, tables
        self.lines: list[str] = []
        self.uniforms: list[Expr] = []
        self.inputs: set[str] = set()
        self._names: dict[Expr, str] = {}

    def print(self, *roots: Expr) -> list[str]:
        """Statements for these expressions are added to ``lines``; returns the names of their values."""
        return [self._name(root) for root in roots]

    def _name(self, node: Expr) -> str:
        if node not in self._names:
            self._names[node] = self._define(node)
        return self._names[node]

    def _define(self, node: Expr) -> str:
        if node.op == "input":
            self.inputs.add(node.name)
            return node.name
        if node.op == "const":
            return repr(node.value) if math.isfinite(node.value) else f'float("{node.value}")'
        if node.uniform:
            self.uniforms.append(node)
            return f"U{len(self.uniforms) - 1}"
        args = [self._name(arg) for arg in node.args]
        if node.op == "take":
            table = [float(v) for v in node.name.split(",")]
            self.tables += table
            text = f"tl.load(tables + {len(self.tables) - len(table)} + ({args[0]}).to(tl.int32))"
        elif node.op in _INFIX:
            text = f"{args[0]} {_INFIX[node.op]} {args[1]}"
        else:
            text = _CALLS[node.op].format(*args)
        name = f"{self.prefix}{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return name


def codec_lines(codec: Codec, rounding: str, tag: str, tables: list[float]) -> str:
    """Device functions ``encode_TAG(x, inverse, noise, tables)`` and ``decode_TAG(code, scale, tables)``."""
    noise = element("noise") if rounding == "stochastic" else None
    parts = []
    for name, arguments, root in (
        ("encode", "x, inverse, noise, tables", codec.encode(element("x"), element("inverse"), noise)),
        ("decode", "code, scale, tables", codec.decode(element("code"), element("scale"))),
    ):
        printer = Printer("t", tables)
        (result,) = printer.print(root)
        body = "".join(f"    {line}\n" for line in printer.lines)
        parts.append(f"@triton.jit\ndef {name}_{tag}({arguments}):\n{body}    return {result}\n\n\n")
    return "".join(parts)


@functools.lru_cache(maxsize=512)
def load_source(source: str) -> Any:
    """The names that a printed module defines. Triton reads a function's text through linecache, so it is put there."""
    name = f"<memopt-triton-{hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(source, name, "exec"), namespace)
    return SimpleNamespace(**namespace)
