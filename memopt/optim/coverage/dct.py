"""The orthonormal DCT-II basis: chosen columns of it, projections onto them, and how much of a matrix lies along each.

Column ``k`` of the basis of length ``n`` is ``D[j, k] = c_k cos(pi (2 j + 1) k / (2 n))``, ``c_0 = sqrt(1 / n)`` and
``c_k = sqrt(2 / n)`` otherwise, so that ``D^T D = D D^T = I``. The basis is never stored: chosen columns are computed
when they are used, and all of them at once are a fast Fourier transform (Makhoul, 1980).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 22  # elements of a matrix handled at once


def columns(length: int, chosen: Tensor) -> Tensor:
    """The chosen columns of the basis, float32 [length, chosen]."""
    j = torch.arange(length, device=chosen.device)
    turns = (2 * j[:, None] + 1) * chosen.long() % (4 * length)  # whole quarters of 1/n turns: no large angles
    weight = torch.where(chosen == 0, math.sqrt(1 / length), math.sqrt(2 / length))
    return torch.cos(turns.double().mul_(math.pi / (2 * length))).float() * weight


def transform(rows: Tensor) -> Tensor:
    """``rows @ D``: every row's coefficient along every column of the basis; float32."""
    length = rows.shape[-1]
    x = rows.float()
    order = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1)
    spectrum = torch.fft.fft(order)
    angle = torch.arange(length, device=rows.device, dtype=torch.float64) * (-math.pi / (2 * length))
    turn = torch.polar(torch.full_like(angle, math.sqrt(2 / length)), angle).to(spectrum.dtype)
    result: Tensor = (spectrum * turn).real
    result[..., 0] *= math.sqrt(0.5)
    return result


def row_chunks(matrix: Tensor) -> Iterator[slice]:
    """Slices of the first dimension of about ``CHUNK`` elements."""
    count = max(1, CHUNK // max(1, matrix.shape[1]))
    for first in range(0, matrix.shape[0], count):
        yield slice(first, min(first + count, matrix.shape[0]))


def weights(matrix: Tensor, *, along_rows: bool) -> Tensor:
    """How much of the matrix lies along each basis vector: the sum of the magnitudes of its coefficients, float64.

    Args:
        matrix: float [rows, columns].
        along_rows: take basis vectors of the length of a column (``D^T matrix``) instead of a row (``matrix D``).
    """
    if along_rows:
        total = torch.zeros(matrix.shape[0], dtype=torch.float64, device=matrix.device)
        count = max(1, CHUNK // max(1, matrix.shape[0]))
        for first in range(0, matrix.shape[1], count):
            total += transform(matrix[:, first : first + count].T).abs().sum(0, dtype=torch.float64)
        return total
    total = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for part in row_chunks(matrix):
        total += transform(matrix[part]).abs().sum(0, dtype=torch.float64)
    return total


def project(matrix: Tensor, chosen: Tensor, *, along_rows: bool) -> Tensor:
    """Coefficients along the chosen columns: ``matrix D[:, chosen]``, or ``D[:, chosen]^T matrix``; float32."""
    basis = columns(matrix.shape[0 if along_rows else 1], chosen)
    if not along_rows:
        parts = [matrix[part].float() @ basis for part in row_chunks(matrix)]
        return torch.cat(parts) if parts else basis.new_zeros(0, len(chosen))
    result = basis.new_zeros(len(chosen), matrix.shape[1])
    for part in row_chunks(matrix):
        result += basis[part].T @ matrix[part].float()
    return result


def expand(coefficients: Tensor, basis: Tensor, part: slice, *, along_rows: bool) -> Tensor:
    """Rows ``part`` of the matrix that has these coefficients along the columns of ``basis``."""
    return basis[part] @ coefficients if along_rows else coefficients[part] @ basis.T
