"""What may be done to logits that are not there yet without computing them: one function per kind of call.

A rule gets the function that was called, the lazy logits, their terms and the call's other arguments. It returns what
the call returns, or NotImplemented to have the values computed. The next rule is one function under ``rule``.
Importing this file registers them: whoever makes lazy logits does.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memopt.integrations.lazy_calls import rule
from memopt.integrations.lazy_logits import LazyLogits, Terms

# -- dtype, copies ----------------------------------------------------------------------------------------------------

_CASTS = {
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
}


@rule(*_CASTS)
def cast(func: Any, lazy: LazyLogits, terms: Terms) -> Any:
    """``logits.float()`` and the like: the loss is summed in float32 in any case."""
    return lazy.derive((func, (), {}), terms, _CASTS[func])


@rule(Tensor.to)
def to(func: Any, lazy: LazyLogits, terms: Terms, *args: Any, copy: bool = False, **kwargs: Any) -> Any:
    """``logits.to(...)`` on the same device."""
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    dtype = dtype or lazy.dtype
    if (device is not None and device != lazy.device) or memory_format is not None or not dtype.is_floating_point:
        return NotImplemented
    return lazy.derive((func, (dtype,), {"copy": copy}), terms, dtype)


@rule(Tensor.contiguous, Tensor.clone, torch.clone)
def copied(func: Any, lazy: LazyLogits, terms: Terms, **kwargs: Any) -> Any:
    """The same logits again, or in another order of memory."""
    return lazy.derive((func, (), kwargs), terms, lazy.dtype)


@rule(Tensor.detach, torch.detach)
def detach(func: Any, lazy: LazyLogits, terms: Terms) -> Any:
    """The same logits outside of autograd."""
    return NotImplemented if lazy.is_computed else lazy.detached()


# -- positions --------------------------------------------------------------------------------------------------------


@rule(Tensor.view, Tensor.reshape, torch.reshape)
def view(func: Any, lazy: LazyLogits, terms: Terms, *shape: Any, **kwargs: Any) -> Any:
    """Another shape over the positions; the vocabulary stays the last dimension."""
    sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)
    if kwargs or not sizes or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known:
        sizes[sizes.index(-1)] = lazy.numel() // known
    if -1 in sizes or sizes[-1] != lazy.shape[-1] or math.prod(sizes) != lazy.numel():
        return NotImplemented
    leading = sizes[:-1]
    changed = terms.with_rows(lambda hidden: hidden.reshape(*leading, hidden.shape[-1]))
    return lazy.derive((Tensor.reshape, tuple(sizes), {}), changed, lazy.dtype)


@rule(Tensor.flatten, torch.flatten)
def flatten(func: Any, lazy: LazyLogits, terms: Terms, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Positions in one dimension."""
    first, last = (d + lazy.dim() if d < 0 else d for d in (start_dim, end_dim))
    if not 0 <= first <= last < lazy.dim() - 1:
        return NotImplemented
    changed = terms.with_rows(lambda hidden: hidden.flatten(first, last))
    return lazy.derive((Tensor.flatten, (first, last), {}), changed, lazy.dtype)


@rule(Tensor.__getitem__)
def index(func: Any, lazy: LazyLogits, terms: Terms, key: Any) -> Any:
    """Some of the positions, or the first entries of the vocabulary."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(isinstance(k, (list, bool)) for k in keys):
        return NotImplemented
    used = sum(k.dim() if isinstance(k, Tensor) and k.dtype == torch.bool else 1 for k in keys if not _is_free(k))
    entries = slice(None)
    if used == lazy.dim() and isinstance(keys[-1], slice):
        entries = keys.pop()
        used -= 1
    elif used == lazy.dim() and keys[-1] is not Ellipsis:
        return NotImplemented
    if used >= lazy.dim() or entries.start or entries.step not in (None, 1):
        return NotImplemented
    here = (*keys,) if any(k is Ellipsis for k in keys) else (*keys, ...)
    changed = terms.with_rows(lambda hidden: hidden[here])
    if entries.stop is not None:
        bias = None if terms.bias is None else terms.bias[: entries.stop]
        changed = replace(changed, weight=terms.weight[: entries.stop], bias=bias)
    return lazy.derive((func, (key,), {}), changed, lazy.dtype)


def _is_free(key: Any) -> bool:
    return key is None or key is Ellipsis


# -- values -----------------------------------------------------------------------------------------------------------


@rule(Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply)
def scaled(func: Any, lazy: LazyLogits, terms: Terms, factor: Any) -> Any:
    """A factor: a number, or a tensor of no dimensions that needs no gradient."""
    return _scaled(func, lazy, terms, factor, factor)


@rule(Tensor.div, torch.div, Tensor.__truediv__, torch.true_divide, Tensor.true_divide)
def divided(func: Any, lazy: LazyLogits, terms: Terms, divisor: Any) -> Any:
    """The same with a divisor."""
    if isinstance(divisor, (int, float)) and divisor == 0:
        return NotImplemented
    return _scaled(func, lazy, terms, divisor, 1.0 / divisor)


def _scaled(func: Any, lazy: LazyLogits, terms: Terms, argument: Any, factor: Any) -> Any:
    if isinstance(factor, Tensor):
        if factor.dim() or factor.requires_grad or not factor.is_floating_point() or factor.device != lazy.device:
            return NotImplemented
    elif isinstance(factor, bool) or not isinstance(factor, (int, float)):
        return NotImplemented
    if terms.cap is None:
        changed = replace(terms, scale=terms.scale * factor)
    elif isinstance(factor, Tensor) or factor <= 0:
        return NotImplemented
    else:
        changed = replace(terms, cap=terms.cap * factor)
    return lazy.derive((func, (argument,), {}), changed, lazy.dtype)


@rule(torch.tanh, Tensor.tanh)
def bounded(func: Any, lazy: LazyLogits, terms: Terms) -> Any:
    """The middle of a softcap."""
    return NotImplemented if terms.cap is not None else lazy.derive((func, (), {}), replace(terms, cap=1.0), lazy.dtype)


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def shifted(func: Any, lazy: LazyLogits, terms: Terms, bias: Any) -> Any:
    """One more bias over the vocabulary, such as ``final_logits_bias``; it needs no gradient."""
    plain = isinstance(bias, Tensor) and not isinstance(bias, LazyLogits) and not bias.requires_grad
    if not plain or terms.cap is not None or isinstance(terms.scale, Tensor) or not terms.scale:
        return NotImplemented
    fits = 0 < bias.dim() <= lazy.dim() and bias.numel() == bias.shape[-1] == lazy.shape[-1]
    if not fits or bias.dtype != lazy.dtype or bias.device != lazy.device:
        return NotImplemented
    more = bias.reshape(-1) / terms.scale
    changed = replace(terms, bias=more if terms.bias is None else terms.bias + more)
    return lazy.derive((func, (bias,), {}), changed, lazy.dtype)


# -- the loss ---------------------------------------------------------------------------------------------------------


@rule(F.cross_entropy)
def cross_entropy(
    func: Any,
    lazy: LazyLogits,
    terms: Terms,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """What all this is for. Arguments that torch refuses are left for torch to refuse."""
    if lazy.dim() != 2 or size_average is not None or reduce is not None or not isinstance(target, Tensor):
        return NotImplemented
    soft = target.is_floating_point()
    expected = lazy.shape if soft else lazy.shape[:1]
    unfit = target.shape != expected or target.device != lazy.device or not (soft or target.dtype == torch.int64)
    if unfit or target.requires_grad or reduction not in ("mean", "sum", "none") or not 0 <= label_smoothing <= 1:
        return NotImplemented
    if weight is not None and (weight.shape != lazy.shape[1:] or weight.device != lazy.device or weight.requires_grad):
        return NotImplemented
    return lazy.cross_entropy(
        terms,
        target,
        class_weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
