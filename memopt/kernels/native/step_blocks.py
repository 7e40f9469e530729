"""Prints what a tile does once for each block: its codes and scales are found, decoded, made anew and packed."""

from __future__ import annotations

import torch

from memopt.kernels.codecs import Codec
from memopt.kernels.native.cpp import CPP_TYPES, literal
from memopt.kernels.native.step_parts import Parts


class Blocks(Parts):
    """The lines that belong to blocks."""

    def _open_codec(self, j: int, codec: Codec) -> list[str]:
        block = codec.block
        lines = [
            *self._open_place(j, codec),
            f"alignas(64) float new{j}[{2 * self.tile + 64}];",
            f"vu maxima{j}[{2 * self.tile // block + 2}] = {{}};",
            f"float fresh{j}[{2 * self.tile // block + 2}], inverses{j}[{2 * self.tile // block + 2}];",
        ]
        if codec.bits == 4:
            lines += [
                f"alignas(64) uint8_t codes{j}[{2 * self.tile + 64}];",
                *self._unless_paired(
                    j,
                    self._each_block(
                        j, codec, [f"unpack(codes{j} + at, packed{j} + (at / {block}) * {(block + 1) // 2}, length);"]
                    ),
                ),
            ]
        return lines

    @staticmethod
    def _open_place(j: int, codec: Codec) -> list[str]:
        """Where the scales of state j's row lie, and its codes from here on; the number of the block that is here."""
        block, data = codec.block, f"t.state[{j}].data + row"
        packed = f"{data} * bytes_in_row(t.cols, in_row{j}, {block}) + block{j} * {(block + 1) // 2}"
        return [
            f"int64_t in_row{j} = blocks_in_row(t, {block}), block{j} = col / {block};",
            f"float* scales{j} = t.state[{j}].scales + row * in_row{j};",
            f"uint8_t* codes{j} = {data} * t.cols + col;" if codec.bits == 8 else f"uint8_t* packed{j} = {packed};",
        ]

    def _open_plain(self, j: int, dtype: torch.dtype) -> list[str]:
        kind = CPP_TYPES[dtype]
        return [f"{kind}* plain{j} = ({kind}*)t.state[{j}].data + row * t.cols + col;"]

    def _unless_paired(self, j: int, lines: list[str]) -> list[str]:
        return ["if (!whole) {", *lines, "}"] if j in self.paired else lines

    def _each_block(self, j: int, codec: Codec, body: list[str]) -> list[str]:
        """A loop over the blocks of state j in this tile: number ``k``, place ``at`` and ``length``."""
        return [
            "for (int k = 0, at = 0; at < n; k++) {",
            f"int length = block{j} + k == in_row{j} - 1 ? n - at : {codec.block};",
            *body,
            "at += length;",
            "}",
        ]

    def _segment_scales(self) -> list[str]:
        lines = []
        for j in self.kind.quantised:
            codec = self._codec(j)
            lines += [
                *self._block_of_segment(j, codec),
                f"float scale{j} = scales{j}[block{j} + k{j}];",
                *self._decoder(j),
                f"vu maximum{j} = maxima{j}[k{j}];",
            ]
        return lines

    def _decoder(self, j: int) -> list[str]:
        """What decodes a block of state j whose scale is known."""
        scale = f"(scale{j} * uniforms[{self.gains[j]}])" if j in self.gains else f"scale{j}"
        parts = [part.replace("scale", scale) for part in self.scale_parts[j]]
        lines = [f"const vf c{j}[] = {{{', '.join(f'splat({part})' for part in parts)}}};"]
        if self._codec(j).bits == 4:
            lines.append(f"const auto value{j} = nibbles([&](vf code) {{ return decode_{j}(code, c{j}); }});")
        return lines

    @staticmethod
    def _block_of_segment(j: int, codec: Codec) -> list[str]:
        return [
            f"int64_t k{j} = from / {codec.block};",
            f"if (block{j} + k{j} >= in_row{j}) k{j} = in_row{j} - 1 - block{j};",
        ]

    def _segment_inverses(self) -> list[str]:
        lines = []
        for j in self.coded:
            lines += [*self._block_of_segment(j, self._codec(j)), f"vf inverse{j} = splat(inverses{j}[k{j}]);"]
        return lines

    def _close_segment(self) -> list[str]:
        """The scales of a segment's blocks so far: while the next segment is computed. A row's last block may go on in
        the next segment, which still has to be decoded: what the new scales replace is written later."""
        lines = []
        for j in self.coded:
            lines += [
                f"maxima{j}[k{j}] = maximum{j};",
                f"const Scale closed{j} = scale_of(maximum{j}, {self._top(j)});",
                f"fresh{j}[k{j}] = closed{j}.scale, inverses{j}[k{j}] = closed{j}.inverse;",
                self._is_rare(j),
            ]
        return lines

    @staticmethod
    def _is_rare(j: int) -> str:
        return f"rare |= (closed{j}.lift != 1.0f) & (closed{j}.scale != 0);"

    def _write_scales(self, j: int) -> list[str]:
        fresh = self._in_units(j, f"fresh{j}[k]")
        return self._each_block(j, self._codec(j), [f"scales{j}[block{j} + k] = {fresh};"])

    def _in_units(self, j: int, scale: str) -> str:
        """The scale of what the first pass has made of state j, as it is stored."""
        return f"{scale} * uniforms[{self.units[j]}]" if j in self.units else scale

    def _close_again(self, j: int) -> list[str]:
        """The scales of blocks whose values have been changed."""
        lines = [f"Scale s = scale_again(new{j} + at, length, {self._top(j)});"]
        return self._each_block(j, self._codec(j), [*lines, f"fresh{j}[k] = s.scale, inverses{j}[k] = s.inverse;"])

    def _codec(self, j: int) -> Codec:
        codec = self.kind.stored[j]
        assert isinstance(codec, Codec)
        return codec

    def _top(self, j: int) -> str:
        return literal(self._codec(j).top(self.kind.roundings[j]))

    def _narrow(self, j: int) -> list[str]:
        plain, half = f"narrow(codes{j}, new{j}, n);", self.segment // 2
        if j not in self.paired:
            return [plain]
        pairs = f"narrow_pairs(packed{j} + at, new{j} + 2 * at, {half});"
        return ["if (whole) {", f"for (int at = 0; at < n / 2; at += {half}) {pairs}", "} else {", plain, "}"]

    def _pack(self, j: int) -> list[str]:
        codec = self._codec(j)
        if codec.bits != 4:
            return []
        place = f"packed{j} + k * {(codec.block + 1) // 2}"
        return self._unless_paired(j, self._each_block(j, codec, [f"pack({place}, codes{j} + at, length);"]))
