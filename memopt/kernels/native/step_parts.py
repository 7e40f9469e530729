"""What the function that updates one tile is made of: the parts that its sections share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memopt.kernels.codecs import Codec
from memopt.kernels.native.cpp import CPP_TYPES
from memopt.kernels.native.stages import Stages, staged
from memopt.kernels.native.step_kind import GRAD_SCALE, StepKind


@dataclass(frozen=True)
class Parts:
    """What the function that updates a tile is made of."""

    kind: StepKind
    tile: int
    segment: int
    lines: list[str]  # of the first pass
    news: dict[int, str]
    param: str
    late: list[str] | None  # what computes the parameter in the second pass
    stages: dict[int, Stages]  # of the encodings that begin with something slow
    sums: list[str]
    uniforms: int
    scale_parts: dict[int, list[str]]
    gains: dict[int, int]  # the number in ``U`` that a state is decoded times
    units: dict[int, int]  # the number in ``U`` that a new state is still to be multiplied by

    @property
    def late_stages(self) -> Stages | None:
        """The parameter's update in the second pass in two stages."""
        return staged(self.late or [], [self.param])

    @property
    def coded(self) -> list[int]:
        """Numbers of the states that are encoded."""
        return [j for j in self.kind.quantised if j in self.news]

    @property
    def paired(self) -> list[int]:
        """Numbers of the states whose 4-bit codes are taken two by two where every block is whole: a byte has those of
        an element in a block's first half and one in its second. None where blocks are not the segments."""
        four = {j: s.block for j, s in enumerate(self.kind.stored) if isinstance(s, Codec) and s.bits == 4}
        return list(four) if self.segment % 32 == 0 and set(four.values()) == {self.segment} else []

    def _open_tile(self) -> list[str]:
        """Where a function over elements of a row begins: its numbers, its place, the keys of its random words."""
        lines = [f"const vf U{i} = splat(uniforms[{i}]);" for i in range(self.uniforms)]
        lines += [f"const vf {GRAD_SCALE} = U{self.uniforms - 1};"] if self.kind.graded else []
        lines += [
            f"using P = {CPP_TYPES[self.kind.param]};",
            f"using G = {CPP_TYPES[self.kind.grad]};",
            "P* param = (P*)t.param + row * t.cols + col;",
            "const G* grad = (const G*)t.grad + row * t.cols + col;",
        ]
        draws = sorted({slot // 2 for slot in self.kind.noisy})
        if draws:
            lines.append("uint32_t index = (uint32_t)(t.start + row * t.cols + col);")
        return [*lines, *[f"uint32_t key{d} = row_key(t.key, t.start + row * t.cols, {d});" for d in draws]]

    @property
    def _early_slots(self) -> list[int]:
        """Slots whose random numbers the first pass may need: those of plain states, and an early parameter's."""
        plain = [j for j in self.news if j not in self.kind.quantised]
        return [*plain, *([len(self.kind.stored)] if self.late is None and self.param else [])]

    @property
    def _late_slots(self) -> list[int]:
        return [*self.coded, *([] if self.late is None else [len(self.kind.stored)])]

    def _draws_of(self, slots: Iterable[int]) -> list[int]:
        return sorted({slot // 2 for slot in slots if slot in self.kind.noisy})

    def _open_words(self, slots: Iterable[int], start: str = "from") -> list[str]:
        """Where a loop over elements begins: the generators of the random words that its slots need."""
        return [f"Words words{draw}(key{draw}, index + {start});" for draw in self._draws_of(slots)]

    def _words(self, slots: Iterable[int], how: str) -> list[str]:
        """The random words of some slots that need them."""
        place = "[second]" if how == "pair" else ""
        return [f"vu w{draw} = words{draw}{place}.next();" for draw in self._draws_of(slots)]
