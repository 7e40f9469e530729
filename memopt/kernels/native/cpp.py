"""Prints symbolic operands as C++ on the vectors of vec.hpp."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from memopt.kernels import math as km
from memopt.kernels.codecs import Codec
from memopt.kernels.expr import Expr, element, scalar
from memopt.kernels.native.stages import Stages, staged

CPP_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_CALLS = {
    "neg": "vneg",
    "sqrt": "vsqrt",
    "rsqrt": "vrsqrt",
    "rough_sqrt": "vsqrt",
    "root4": "vroot4",
    "step_down": "vstep_down",
    "abs": "vabs",
    "copysign": "vcopysign",
    "sign": "vsign",
    "exponent": "vexponent",
    "power_of_two": "vpower_of_two",
    "floor": "vfloor",
    "exp": "vexp",
    "log": "vlog",
    "minimum": "vmin",
    "maximum": "vmax",
    "fma": "fma",
    "where": "select",
    "and": "both",
    "or": "either",
    "not": "negate",
    **{op: op for op in ("lt", "le", "gt", "ge", "eq", "ne")},
}

_FAST = {"sqrt": "vsqrt_fast", "rough_sqrt": "vsqrt_rough", "root4": "vroot4_fast"}


class Printer:
    """Turns expressions into statements; each node once.

    Args:
        fast: functions for which estimates do, with a Newton step or so (codecs choose neighbours with them, and
            compare exactly afterwards).
        fuse: one rounding for a product that is only used in a sum (rules; codecs say ``fma`` where they mean it).
    """

    def __init__(self, *, fast: Sequence[str] = (), fuse: bool = False) -> None:
        self.fast, self.fuse = fast, fuse
        self.lines: list[str] = []
        self.uniforms: list[Expr] = []
        self.tables: list[tuple[float, ...]] = []
        self._names: dict[Expr, str] = {}
        self._uses: Counter[Expr] = Counter()

    def sequel(self, known: Mapping[Expr, str]) -> Printer:
        """A printer for a later loop, in which some values have names already; uniforms and tables are shared."""
        other = Printer(fast=self.fast, fuse=self.fuse)
        other.uniforms, other.tables, other._names = self.uniforms, self.tables, dict(known)
        return other

    def print(self, *roots: Expr) -> list[str]:
        """Statements for these expressions are added to ``lines``; returns the names of their values."""
        seen: set[Expr] = set()
        for root in roots:
            self._count(root, seen)
        return [self._name(root) for root in roots]

    def _count(self, node: Expr, seen: set[Expr]) -> None:
        self._uses[node] += 1
        if node in seen or node.uniform:
            return
        seen.add(node)
        for arg in node.args:
            self._count(arg, seen)

    def _name(self, node: Expr) -> str:
        if node not in self._names:
            self._names[node] = self._define(node)
        return self._names[node]

    def _define(self, node: Expr) -> str:
        if node.op == "input":
            return node.name
        if node.op == "const":
            return f"splat({literal(node.value)})"
        if node.uniform:
            self.uniforms.append(node)
            return f"U{len(self.uniforms) - 1}"
        text = self._fused(node) or self._plain(node)
        name = f"t{len(self.lines)}"
        self.lines.append(f"{'vm' if node.boolean else 'vf'} {name} = {text};")
        return name

    def _fused(self, node: Expr) -> str:
        if not self.fuse or node.op not in ("add", "sub"):
            return ""
        left, right = node.args
        for product, other in ((left, right), (right, left)):
            if product.op == "mul" and not product.uniform and self._uses[product] == 1:
                a, b, c = self._name(product.args[0]), self._name(product.args[1]), self._name(other)
                if node.op == "add":
                    return f"mul_add({a}, {b}, {c})"
                return f"mul_add({a}, {b}, -{c})" if product is left else f"mul_add(-{a}, {b}, {c})"
        return ""

    def _plain(self, node: Expr) -> str:
        if node.op == "take":
            table = tuple(float(v) for v in node.name.split(","))
            self.tables.append(table)
            return f"take<{len(table)}>(T{len(self.tables) - 1}, to_int({self._name(node.args[0])}))"
        args = node.args
        if node.op == "sqrt" and "sqrt" in self.fast and args[0].op == "maximum" and _is_zero(args[0].args[1]):
            args = args[0].args[:1]  # the estimate keeps above 0 itself
        names = [self._name(arg) for arg in args]
        if node.op in _INFIX:
            return f"{names[0]} {_INFIX[node.op]} {names[1]}"
        call = _FAST[node.op] if node.op in self.fast else _CALLS[node.op]
        return f"{call}({', '.join(names)})"


def _is_zero(node: Expr) -> bool:
    return node.op == "const" and node.value == 0.0


def literal(value: float) -> str:
    """A float32 constant of C++."""
    if math.isfinite(value):
        return f"{value!r}f"
    return "NAN" if math.isnan(value) else f"{'-' if value < 0 else ''}INFINITY"


def evaluate(node: Expr, scalars: Mapping[str, float]) -> float:
    """A uniform node's value, in double precision."""
    if node.op == "const":
        return node.value
    if node.op == "scalar":
        return float(scalars[node.name])
    args = [evaluate(arg, scalars) for arg in node.args]
    if node.op in _HOST:
        return _HOST[node.op](*args)
    return float(getattr(km, node.op)(*args))


_HOST: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "and": lambda a, b: bool(a) and bool(b),
    "or": lambda a, b: bool(a) or bool(b),
    "not": lambda a: not a,
}


def codec_functions(codec: Codec, rounding: str, tag: str, *, exact_root: bool = False) -> tuple[str, list[str]]:
    """C++ functions ``encode_TAG(x, inverse, noise)`` and ``decode_TAG(code, c)``, and how to compute the array c.

    Where the value is a product at last, ``factors_TAG(code, c, a, b)`` gives its factors.

    ``c`` holds what decoding needs of a block's ``float scale``: C++ expressions, evaluated once per block.
    ``exact_root`` takes square roots by the divider, which is idle, and leaves the ports for products to others.
    """
    encode, code = _encoder(codec, rounding, exact_root)
    decode = Printer()
    root = codec.decode(element("code"), scalar("scale"))
    (value,) = decode.print(root)
    names = [f"const vf U{i} = c[{i}];" for i in range(len(decode.uniforms))]
    text = _function(f"vf encode_{tag}(vf x, vf inverse, vf noise)", encode, f"return {code}")
    text += _function(f"vf decode_{tag}(vf code, const vf* c)", decode, f"return {value}", names)
    if has_factors(codec):
        parts = Printer()
        a, b = parts.print(*root.args)
        text += _function(f"void factors_{tag}(vf code, const vf* c, vf& a, vf& b)", parts, f"a = {a}, b = {b}", names)
    return text, [scalar_text(u) for u in decode.uniforms]


def stage_functions(codec: Codec, rounding: str, tag: str, *, exact_root: bool = False) -> tuple[str, Stages | None]:
    """Encoding in two stages, ``begin_TAG(x, inverse, noise, kept)`` and ``finish_TAG(x, inverse, noise, kept)``, whose
    array ``kept`` goes from one to the other; no text and None where there is nothing to begin with."""
    encode, code = _encoder(codec, rounding, exact_root)
    stages = staged(encode.lines, [code])
    if stages is None:
        return "", None
    arguments = "vf x, vf inverse, vf noise"
    keep = "; ".join(f"kept[{i}] = {name}" for i, name in enumerate(stages.kept))
    given = [f"const vf {name} = kept[{i}];" for i, name in enumerate(stages.kept)]
    text = _function(f"void begin_{tag}({arguments}, vf* kept)", encode, keep, lines=stages.first)
    finish = f"vf finish_{tag}({arguments}, const vf* kept)"
    return text + _function(finish, encode, f"return {code}", given, stages.second), stages


def _encoder(codec: Codec, rounding: str, exact_root: bool) -> tuple[Printer, str]:
    """The printer that has printed a codec's encoding, and the name of the code."""
    noise = element("noise") if rounding == "stochastic" else None
    encode = Printer(fast=("rough_sqrt", "root4") if exact_root else ("sqrt", "rough_sqrt", "root4"))
    (code,) = encode.print(codec.encode(element("x"), element("inverse"), noise))
    return encode, code


def has_factors(codec: Codec) -> bool:
    """Whether decoding ends with a product of two numbers that differ by element."""
    root = codec.decode(element("code"), scalar("scale"))
    return root.op == "mul" and not any(arg.uniform for arg in root.args)


def _function(
    signature: str, printer: Printer, end: str, before: Sequence[str] = (), lines: Sequence[str] | None = None
) -> str:
    """A function of what a printer has printed, or of some lines of it."""
    tables = [f"alignas(64) static const float T{i}[] = {{{_row(t)}}};" for i, t in enumerate(printer.tables)]
    body = "\n    ".join([*before, *tables, *(printer.lines if lines is None else lines), f"{end};"])
    return f"INLINE {signature} {{\n    {body}\n}}\n"


def scalar_text(node: Expr) -> str:
    """A uniform node as a C++ float expression over its scalars' names."""
    if node.op == "const":
        return literal(node.value)
    if node.op == "scalar":
        return node.name
    args = [scalar_text(arg) for arg in node.args]
    if node.op in _INFIX:
        return f"({args[0]} {_INFIX[node.op]} {args[1]})"
    return f"std::{node.op}({', '.join(args)})"


def _row(table: Sequence[float]) -> str:
    return ", ".join(literal(v) for v in table)


@functools.cache
def header() -> str:
    """vec.hpp, with its parts in place of their includes, and blocks.hpp."""
    text = read("vec.hpp")
    for part in ("vec_avx512.hpp", "vec_avx2.hpp", "vec_generic.hpp"):
        text = text.replace(f'#include "{part}"\n', read(part))
    return text + read("blocks.hpp")


def read(name: str) -> str:
    """One of the C++ texts beside this file."""
    return (Path(__file__).parent / name).read_text()
