"""How close two computations of one thing must be: no further from float64 than the plain one is, but for luck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.kernels.loss_cases import error, ratio_limit

SINGLE = torch.finfo(torch.float32).eps
LUCK = 2.0  # two runs that round at like places have errors of one size; the plain one's may be the smaller by luck


def check_as_exact(
    found: Mapping[str, Tensor], plain: Mapping[str, Tensor], truth: Mapping[str, Tensor], luck: float = LUCK
) -> None:
    """Each tensor's relative error in norm is at most the plain one's, but for luck and the roundings at its own end.

    Luck is ``luck`` or, where few elements carry the error, what chance makes of so few (``ratio_limit``). The
    roundings are two in the plain result's dtype: the last sum and the store.
    """
    assert found.keys() == plain.keys() == truth.keys()
    far = {}
    for name, value in found.items():
        assert truth[name].dtype == torch.float64, name
        own, usual = error(value, truth[name]), error(plain[name], truth[name])
        limit = max(luck, ratio_limit(value, plain[name], truth[name]))
        if not own <= limit * usual + 2 * torch.finfo(plain[name].dtype).eps:
            far[name] = (own, usual)
    assert not far, far


def check_losses_as_exact(
    found: Sequence[float], plain: Sequence[float], truth: Sequence[float], rounding: float = 4 * SINGLE
) -> None:
    """The same for losses of consecutive steps, each of which may be off by ``rounding`` as a share of itself.

    One loss may hit the truth by chance, so the yardstick is the plain run's worst relative error so far. The default
    is four roundings in float32: of the logarithm, the exponentials' sum, the mean and the store.
    """
    assert len(found) == len(plain) == len(truth) > 0
    worst = 0.0
    for step, (ours, usual, exact) in enumerate(zip(found, plain, truth, strict=True)):
        worst = max(worst, abs(usual / exact - 1))
        assert abs(ours / exact - 1) <= LUCK * worst + rounding, (step, ours, usual, exact)


class InDouble(TorchFunctionMode):
    """Runs a model in float64 whose code turns to float32 in places; random numbers stay those of float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.data.__set__:  # a model that is turned to float64 puts other data into its parameters
            return func(*args)
        if any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves((args, kwargs))):
            if func is Tensor.float:
                return args[0]
            if func is Tensor.uniform_:
                return args[0].copy_(torch.empty(args[0].shape).uniform_(*args[1:], **kwargs))
            args, kwargs = tree_map(_widened, (args, kwargs))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value
