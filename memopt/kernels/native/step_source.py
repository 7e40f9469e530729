"""Prints the fused step of one rule, with its codecs and dtypes, as one C++ translation unit."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass

from memopt.kernels.codecs import Codec
from memopt.kernels.expr import Expr, scalar
from memopt.kernels.native.cpp import Printer, codec_functions, header, literal, read, stage_functions
from memopt.kernels.native.factors import computed
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
    """The step of a kind."""
    what = computed(kind)
    first = Printer(fuse=True)
    first.uniforms += what.uniforms
    stored = {new: f"n{j}" for j, new in what.states.items() if j in kind.quantised}
    new_p = [] if what.param is None else [what.param]
    late = bool(stored) and not what.sums and all(_leaves(e, stored) <= {"p", "g", GRAD_SCALE} for e in new_p)
    early, later = ([], new_p) if late else (new_p, [])  # the second pass holds the new states: less to load
    names = first.print(*what.states.values(), *early, *what.sums)
    news, rest = names[: len(what.states)], names[len(what.states) :]
    second = first.sequel(stored)
    param, sums = "".join([*rest[: len(early)], *second.print(*later)]), rest[len(early) :]
    if kind.graded:
        first.uniforms.append(scalar(GRAD_SCALE))

    blocks = [s.block for s in kind.stored if isinstance(s, Codec)]
    whole = math.lcm(*blocks) if blocks else TILE
    tile = whole * -(-TILE // whole)
    functions, scale_parts, stages = list[str](), dict[int, list[str]](), dict[int, Stages]()
    for j in kind.quantised:
        codec = kind.stored[j]
        assert isinstance(codec, Codec)
        text, scale_parts[j] = codec_functions(codec, kind.roundings[j], str(j), exact_root=j == kind.quantised[0])
        functions.append(text)
        text, two = stage_functions(codec, kind.roundings[j], str(j), exact_root=j == kind.quantised[0])
        if two is not None and j in what.states:
            functions.append(text)
            stages[j] = two
    body = Body(
        kind=kind,
        tile=tile,
        segment=min(blocks, default=tile),
        lines=first.lines,
        news=dict(zip(what.states, news, strict=True)),
        param=param,
        late=second.lines if later else None,
        stages=stages,
        sums=sums,
        uniforms=len(first.uniforms),
        scale_parts=scale_parts,
        gains=what.gains,
        units=what.units,
    )
    narrow = tile // 2 if tile // whole % 4 == 0 else tile  # small blocks gain less from many in a tile
    sizes = {"N_STATES": len(kind.stored), "N_SUMS": len(what.sums), "UNIT": whole if blocks else 1}
    text = "".join(
        [
            f"{header()}enum {{ {', '.join(f'{name} = {size}' for name, size in sizes.items())} }};\n",
            f"#if MEMOPT_AVX512\nenum {{ TILE = {MERGED_TILE if body.merges else narrow} }};\n",
            f"#else\nenum {{ TILE = {tile} }};\n#endif\n",
            read("step.hpp"),
            *functions,
            *[f"alignas(64) static const float T{i}[] = {{{', '.join(map(literal, t))}}};\n"
              for i, t in enumerate(first.tables)],
            body.function(),
        ]
    )  # fmt: skip
    return StepSource(text, first.uniforms, tuple(what.gains.values()), tuple(what.positive))


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
