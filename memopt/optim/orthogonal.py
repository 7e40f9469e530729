"""The Newton-Schulz iteration that Muon and NorMuon share."""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int = 5, coefficients: tuple[float, float, float] = COEFFICIENTS) -> Tensor:
    """Roughly ``U V^T`` of ``matrix = U S V^T``: its singular values are driven to about 0.7 to 1.2.

    ``X = X / ||X||``, then ``steps`` times ``X = a X + (b X X^T + c (X X^T)^2) X`` on the wide side, in bf16 as in
    Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), whose coefficients trade accuracy
    for speed: the slope at 0 is as steep as the iteration allows.

    Args:
        matrix: ``[rows, columns]``, any float type; not changed.
        steps: iterations.
        coefficients: ``a``, ``b`` and ``c``.

    Returns:
        bf16 ``[rows, columns]``. Temporaries: three matrices of bf16, of which two have the smaller side squared.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix).to(torch.bfloat16)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
