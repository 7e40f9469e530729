"""Prints the fused step of one rule, with its codecs and dtypes, as one C++ translation unit."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from types import SimpleNamespace

from memopt.kernels.codecs import Codec
from memopt.kernels.expr import Expr, constant, element, scalar
from memopt.kernels.native.cpp import Printer, codec_functions, has_factors, header, literal, read, stage_functions
from memopt.kernels.native.simplify import rewritten, scaled_uses, uniform_factor, units_of
from memopt.kernels.native.stages import Stages
from memopt.kernels.native.step_body import Body
from memopt.kernels.native.step_kind import GRAD_SCALE, StepKind
from memopt.kernels.native.step_merged import MERGED_TILE

TILE = 512  # elements whose new states wait in buffers at once; with 1024 the first cache loses what was prefetched


@dataclass(frozen=True)
class StepSource:
    """A step's source.

    ``uniforms`` go into its array ``U``; those at ``gains`` must not be negative, and what is ``positive`` must be
    above 0.
    """

    text: str
    uniforms: list[Expr]
    gains: tuple[int, ...]
    positive: tuple[Expr, ...]


def step_source(kind: StepKind) -> StepSource:
    """The step of a kind.

    Where numbers may be moved between factors (``kind.scaled``), a state is decoded times what the rule multiplies it
    by, and computed in units of what the rule multiplies all the rest by: only scales of blocks are multiplied.
    """
    count, update = len(kind.stored), kind.update
    inputs = tuple(element(f"s{j}") for j in range(count))
    p, g = element("p"), element("g")
    scalars = {name: scalar(name) for name in update.scalars}
    if GRAD_SCALE in scalars:  # an input: no factor to move elsewhere
        scalars[GRAD_SCALE] = element(GRAD_SCALE) if kind.graded else constant(1.0)
    new_p, states, sums = update.apply(p, g, inputs, SimpleNamespace(**scalars))
    first = Printer(fuse=True)
    written = [j for j in range(count) if states[j] is not inputs[j]]
    gains, units, positive = dict[int, Expr](), dict[int, tuple[Expr, Expr]](), list[Expr]()
    if kind.scaled:
        made: dict[Expr, Expr] = {}
        roots = [rewritten(root, made) for root in (new_p, *states, *sums)]
        gains = scaled_uses(roots, {inputs[j]: j for j in kind.quantised})
        units = units_of(roots, dict(enumerate(roots[1 : count + 1])), gains)
        positive += [unit for unit, _ in units.values()]
        factors = {j: uniform_factor(product) for j, product in gains.items()}
        first.uniforms += [number / units[j][0] if j in units else number for j, number in factors.items()]
        first.uniforms += positive
        made = {product: _decoded(kind, j) for j, product in gains.items()}
        fresh = {j: rewritten(gains[j] + rest, made, positive) for j, (_, rest) in units.items()}
        made |= {roots[j + 1]: fresh[j] * unit for j, (unit, _) in units.items()}
        new_p, *others = (rewritten(root, made, positive) for root in roots)
        states, sums = tuple(fresh.get(j, new) for j, new in enumerate(others[:count])), tuple(others[count:])
    stored = {states[j]: f"n{j}" for j in written if j in kind.quantised}
    late = new_p is not p and not sums and bool(stored) and _leaves(new_p, stored) <= {"p", "g", GRAD_SCALE}
    names = first.print(*[states[j] for j in written], *([new_p] if new_p is not p and not late else []), *sums)
    second = first.sequel(stored)
    param_name = second.print(new_p)[0] if late else "" if new_p is p else names[len(written)]

    if kind.graded:
        first.uniforms.append(scalar(GRAD_SCALE))
    gain_at = {j: at for at, j in enumerate(gains)}
    unit_at = {j: len(gains) + at for at, j in enumerate(units)}
    blocks = [s.block for s in kind.stored if isinstance(s, Codec)]
    unit = math.lcm(*blocks) if blocks else TILE
    tile = unit * -(-TILE // unit)
    wide = tile // 2 if tile // unit % 4 == 0 else tile  # small blocks gain less from many in a tile
    parts = [read("step.hpp")]
    scale_parts: dict[int, list[str]] = {}
    stages: dict[int, Stages] = {}
    for j in kind.quantised:
        codec = kind.stored[j]
        assert isinstance(codec, Codec)
        text, scale_parts[j] = codec_functions(codec, kind.roundings[j], str(j), exact_root=j == kind.quantised[0])
        parts.append(text)
        text, two = stage_functions(codec, kind.roundings[j], str(j), exact_root=j == kind.quantised[0])
        if two is not None and j in written:
            parts.append(text)
            stages[j] = two
    parts += [f"alignas(64) static const float T{i}[] = {{{', '.join(map(literal, t))}}};\n"
              for i, t in enumerate(first.tables)]  # fmt: skip
    body = Body(
        kind,
        tile,
        min(blocks, default=tile),
        first.lines,
        dict(zip(written, names, strict=False)),
        param_name,
        second.lines if late else None,
        stages,
        names[len(names) - len(sums) :] if sums else [],
        len(first.uniforms),
        scale_parts,
        gain_at,
        unit_at,
    )
    wide = MERGED_TILE if body.merges else wide
    parts.insert(0, f"#if MEMOPT_AVX512\nenum {{ TILE = {wide} }};\n#else\nenum {{ TILE = {tile} }};\n#endif\n")
    sizes = {"N_STATES": count, "N_SUMS": len(sums), "UNIT": unit if blocks else 1}
    parts.insert(0, f"{header()}enum {{ {', '.join(f'{name} = {size}' for name, size in sizes.items())} }};\n")
    parts.append(body.function())
    return StepSource("".join(parts), first.uniforms, tuple(gain_at.values()), tuple(positive))


def _decoded(kind: StepKind, j: int) -> Expr:
    """A state decoded times a number: its factors where it has some, so that their product joins a sum."""
    codec = kind.stored[j]
    assert isinstance(codec, Codec)
    return element(f"s{j}a") * element(f"s{j}b") if codec.bits == 8 and has_factors(codec) else element(f"s{j}")


def _leaves(node: Expr, known: Container[Expr]) -> set[str]:
    """The elements that a node is made of, apart from what is known already."""
    found, seen, waiting = set[str](), set[Expr](), [node]
    while waiting:
        one = waiting.pop()
        if one in seen or one in known or one.uniform:
            continue
        seen.add(one)
        waiting += one.args
        if one.op == "input":
            found.add(one.name)
    return found
