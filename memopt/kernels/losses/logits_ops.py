"""The two kernels every vocabulary loss is made of, registered with torch.library.

With raw logits x, scale s and cap c, the final logits are z = c * tanh(s * x / c), or s * x without a cap; x includes
the bias. ``logit_statistics`` reduces a row of z; ``softmax_gradient_`` writes over x the gradient with respect to x of

    of_softmax * lse(z) - of_target * z[target] - of_uniform * sum_v weight[v] * z[v]

(with soft targets: of_target * sum_v weight[v] * soft[v] * z[v] in the middle). The caller chooses the coefficients, so
label smoothing, class weights, the z-loss and a gradient of the log-sum-exp need no code here.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from memopt.kernels.backend import choose_backend
from memopt.kernels.losses import logits_native, logits_torch
from memopt.kernels.losses.logits import Logits


@torch.library.custom_op("memopt::logit_statistics", mutates_args=())
def logit_statistics(
    logits: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    class_weight: Tensor | None,
    soft: Tensor | None,
    scale: Tensor,
    softcap: float,
    want_weighted: bool,
    want_expected: bool,
) -> tuple[Tensor, Tensor]:
    """Statistics of each row of :class:`~memopt.kernels.losses.logits.Logits`, whose fields the first arguments are.

    Returns:
        (5, R): maximum, sum of exp(z - maximum), the same times z - maximum, target logit, weighted sum of z (the
        third and fifth only where wanted); and (R,) int64 argmax.
    """
    x = Logits(logits, target, bias, class_weight, soft, scale, softcap)
    return _implementation(logits).logit_statistics(x, want_weighted, want_expected)  # type: ignore[no-any-return]


@logit_statistics.register_fake
def _(logits, target, bias, class_weight, soft, scale, *_):  # type: ignore[no-untyped-def]
    R = logits.shape[0]
    return scale.new_empty((5, R)), logits.new_empty((R,), dtype=torch.int64)


@torch.library.custom_op("memopt::softmax_gradient_", mutates_args=("logits",))
def softmax_gradient_(
    logits: Tensor,
    coefficients: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    class_weight: Tensor | None,
    soft: Tensor | None,
    scale: Tensor,
    softcap: float,
    want_scale: bool,
) -> Tensor:
    """Writes the gradient over ``logits``; ``coefficients`` is (4, R): lse, of_softmax, of_target, of_uniform.

    Returns the gradient with respect to ``scale`` by row, (R,), where wanted.
    """
    x = Logits(logits, target, bias, class_weight, soft, scale, softcap)
    return _implementation(logits).softmax_gradient_(x, coefficients, want_scale)  # type: ignore[no-any-return]


@softmax_gradient_.register_fake
def _(logits, coefficients, target, bias, class_weight, soft, scale, *_):  # type: ignore[no-untyped-def]
    return scale.new_empty((logits.shape[0],))


def _implementation(logits: Tensor) -> ModuleType:
    chosen = choose_backend(logits.device)
    if chosen == "triton" and logits.dtype != torch.float64 and logits.stride(-1) == 1:
        from memopt.kernels.losses import logits_triton

        return logits_triton
    if chosen == "native" and logits_native.available(logits):
        return logits_native
    return logits_torch
