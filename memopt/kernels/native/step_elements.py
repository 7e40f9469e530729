"""Prints what a tile does with every element: decode and update, then encode."""

from __future__ import annotations

from memopt.kernels.codecs import Codec
from memopt.kernels.native.cpp import has_factors
from memopt.kernels.native.stages import uses
from memopt.kernels.native.step_parts import Parts

PREFETCH = 512  # elements ahead


class Elements(Parts):
    """The lines that belong to a vector of elements."""

    def _element(self, how: str) -> list[str]:
        """The first pass: decode, update, keep the new states for the second, store what has no codec.

        ``how``: a ``"vector"``, its ``"tail"`` of m elements, or one of a ``"pair"`` of vectors.
        """
        kind, count, early, tail = self.kind, len(self.kind.stored), self.late is None, how == "tail"
        some, extra = ("_some", ", m") if tail else ("", "")
        load = "load_some" if tail else "load"
        lines = [] if tail else [f"prefetch(grad + j + {PREFETCH});"]
        if not tail and early:
            lines.append(f"prefetch(param + j + {PREFETCH});")
        lines += [f"vf p = {load}(param + j{extra});", f"vf g = {load}(grad + j{extra});"]
        for j, stored in enumerate(kind.stored):
            if not isinstance(stored, Codec):
                lines.append(f"vf s{j} = {load}(plain{j} + j{extra});")
            elif how == "pair" and j in self.paired:
                lines.append(f"vf s{j} = value{j}((vi)(second ? in{j} >> 4 : in{j}));")
            elif stored.bits == 4:
                lines.append(f"vf s{j} = value{j}(load_bytes(codes{j} + j));")
            elif j in self.gains and has_factors(stored):
                lines += [
                    f"vf s{j}a, s{j}b;",
                    f"factors_{j}(load_codes{some}(codes{j} + j{extra}), c{j}, s{j}a, s{j}b);",
                ]
            else:
                lines.append(f"vf s{j} = decode_{j}(load_codes{some}(codes{j} + j{extra}), c{j});")
        lines += [*self.lines, *self._words(self._early_slots, how)]
        for j, name in self.news.items():
            if j in kind.quantised:
                value = f"first_lanes({name}, m)" if tail else name
                size = f"magnitude(n{j})" if kind.update.states[j].signed else f"as_u(n{j})"
                lines += [f"vf n{j} = {value};", f"store(new{j} + j, n{j});"]
                lines.append(f"maximum{j} = umax(maximum{j}, {size});")
            else:
                lines.append(self._store(f"plain{j} + j", name, j if j in kind.noisy else None, some, extra))
        if self.param and early:
            lines.append(self._store("param + j", self.param, count if count in kind.noisy else None, some, extra))
        for k, name in enumerate(self.sums):
            lines.append(f"sum{k} = sum{k} + {f'first_lanes({name}, m)' if tail else name};")
        return lines

    def _second_element(self, how: str, ahead: bool = False) -> list[str]:
        """The second pass: encode the new states, and update the parameter where nothing else is needed for it.

        Codes may stay in the buffers, over values already encoded, until they are narrowed all at once.
        ``ahead``: what ``_ahead`` has begun waits in ``a``.
        """
        tail = how == "tail"
        lines = [] if tail or self.late is None else [f"prefetch(param + j + {PREFETCH});"]
        lines += [f"vu w{d} = a.w{d};" for d in self._draws_of(self._late_slots)] if ahead else []
        lines += [] if ahead else self._words(self._late_slots, how)
        for j in self.coded:
            lines.append(f"vf n{j} = load(new{j} + j);")
            if ahead and j in self.stages:
                lines.append(f"vf e{j} = finish_{j}(n{j}, inverse{j}, {self._noise(j, 'a.')}, a.kept{j});")
            else:
                lines.append(f"vf e{j} = encode_{j}(n{j}, inverse{j}, {self._noise(j)});")
            if how == "pair" and j in self.paired:
                lines.append(f"out{j}[second] = as_u(e{j});")
            elif tail:
                lines.append(f"keep_codes_some(codes{j} + j, new{j} + j, e{j}, m);")
            else:
                lines.append(f"keep_codes(codes{j} + j, new{j} + j, e{j});")
        return [*lines, *self._late_update(how, ahead)]

    def _noise(self, j: int, kept: str = "") -> str:
        """The noise of a state's rounding; ``kept`` says where it is if its encoding has begun with it."""
        if j not in self.kind.noisy:
            return "splat(0)"
        return f"{kept}noise{j}" if kept and j in self._begun_with_noise else f"noise_of(w{j // 2}, {j})"

    @property
    def _begun_with_noise(self) -> list[int]:
        return [j for j, stages in self.stages.items() if j in self.kind.noisy and uses(stages.first, "noise")]

    def _ahead(self) -> list[str]:
        """What can begin early of a vector's second pass: all up to roots and divisions, kept in ``a``."""
        lines = [f"vu w{d} = a.w{d} = words{d}.next();" for d in self._draws_of(self._late_slots)]
        for j in self.stages:
            if j in self._begun_with_noise:
                lines.append(f"a.noise{j} = {self._noise(j)};")
            noise = self._noise(j, "a.") if j in self._begun_with_noise else "splat(0)"
            lines.append(f"begin_{j}(load(new{j} + j), inverse{j}, {noise}, a.kept{j});")
        stages = self.late_stages
        if stages is not None:
            loads = {"p": "param", "g": "grad", **{f"n{j}": f"new{j}" for j in self.coded}}
            lines += [f"vf {name} = load({place} + j);" for name, place in loads.items() if uses(stages.first, name)]
            lines += [*stages.first, *[f"a.late[{i}] = {name};" for i, name in enumerate(stages.kept)]]
        return lines

    def _ahead_struct(self) -> list[str]:
        """What ``a`` is."""
        lines = ["struct Ahead {", *[f"vu w{d};" for d in self._draws_of(self._late_slots)]]
        lines += [f"vf noise{j};" for j in self._begun_with_noise]
        lines += [f"vf kept{j}[{max(1, len(stages.kept))}];" for j, stages in self.stages.items()]
        lines += [f"vf late[{len(self.late_stages.kept)}];"] if self.late_stages else []
        return [*lines, "};"]

    @property
    def staged(self) -> bool:
        """Whether the second pass is cut in two; pairs are two chains already, and two stages of them too many
        registers."""
        return not self.paired and (bool(self.stages) or self.late_stages is not None)

    def _stages(self) -> list[str]:
        """The second pass of one vector, in two functions."""
        inline = "__attribute__((always_inline))"
        return [
            f"const auto begin = [&](int j) {inline} {{",
            "Ahead a;",
            *self._ahead(),
            "return a;",
            "};",
            f"const auto finish = [&](int j, const Ahead& a) {inline} {{",
            *self._second_element("vector", ahead=True),
            "};",
        ]

    def _late_update(self, how: str, ahead: bool = False) -> list[str]:
        """The parameter from the new states, where that waits for the second pass."""
        if self.late is None:
            return []
        count = len(self.kind.stored)
        some, extra = ("_some", ", m") if how == "tail" else ("", "")
        slot = count if count in self.kind.noisy else None
        lines, stages = self.late, self.late_stages if ahead else None
        if stages is not None:
            lines = [*[f"vf {name} = a.late[{i}];" for i, name in enumerate(stages.kept)], *stages.second]
        loads = [f"vf p = load{some}(param + j{extra});", f"vf g = load{some}(grad + j{extra});"]
        return [*loads, *lines, self._store("param + j", self.param, slot, some, extra)]

    def _late_element(self, how: str) -> list[str]:
        """The parameter alone, from the new states as the first pass left them."""
        states = [f"vf n{j} = load(new{j} + j);" for j in self.coded]
        return [*self._words([len(self.kind.stored)], how), *states, *self._late_update(how)]

    @staticmethod
    def _store(place: str, name: str, slot: int | None, some: str, extra: str) -> str:
        if slot is None:
            return f"store{some}({place}, {name}{extra});"
        return f"store_noisy{some}({place}, {name}, half_of(w{slot // 2}, {slot}){extra});"
