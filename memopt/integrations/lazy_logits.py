"""Logits that are not there yet: a tensor that knows from which hidden states and weight its values would come.

A cross-entropy takes the hidden states and the weight instead (``memopt.linear_cross_entropy``); a cast, a reshape, a
factor, a softcap (``lazy_rules``) gives logits that are not there yet either; questions about shape, dtype, device and
autograd are answered; anything else computes the values, once, and gets an ordinary tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from memopt.integrations.lazy_calls import ANSWERED, RULES, STORAGE
from memopt.kernels import linear_cross_entropy
from memopt.kernels.losses.checks import autocast_off
from memopt.kernels.losses.problem import values_unknown
from memopt.kernels.losses.settings import DEFAULT_CHUNK_BYTES

Call = tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Terms:
    """Logits as ``cap * tanh(scale * (hidden @ weight.T + bias))``, or without ``cap`` the product times ``scale``.

    hidden: (..., H); weight: (V, H); bias: (V,) or None. All take part in autograd.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float | Tensor = 1.0
    cap: float | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether a loss of these logits has a gradient."""
        parts = (self.hidden, self.weight, self.bias, self.scale)
        return any(part.requires_grad for part in parts if isinstance(part, Tensor))

    def detached(self) -> Terms:
        """The same logits outside of autograd."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)

    def with_rows(self, change: Callable[[Tensor], Tensor]) -> Terms:
        """The same logits at other positions: ``change`` must leave the last dimension alone."""
        return replace(self, hidden=change(self.hidden))


class Source:
    """The product that all logits of one call of the head derive from, as plain values."""

    def __init__(self, terms: Terms, options: dict[str, Any]) -> None:
        self.options = options
        self._inputs = [t if t is None else t.detach() for t in (terms.hidden, terms.weight, terms.bias)]
        if terms.weight.requires_grad and self._inputs[1] is not None:  # decides which product matmul takes
            self._inputs[1].requires_grad_()
        self._versions = [_version(t) for t in self._inputs]
        self.shape = (*terms.hidden.shape[:-1], terms.weight.shape[0])

    def check(self) -> None:
        """RuntimeError where the values can no longer be computed as they would have been in forward."""
        if [_version(t) for t in self._inputs] != self._versions:
            raise RuntimeError(
                "these logits were never computed, and the head's weight or the hidden states have changed since the "
                "forward pass (an optimizer step?); read out.logits before the step, or remove fuse_loss"
            )
        weight = self._inputs[1]
        if weight is not None and _is_freed(weight):
            raise RuntimeError(
                "the output head's weight has been freed since the head's forward: it is sharded by itself (FSDP with "
                "reshard_after_forward). Shard the head together with the root module, or with "
                "reshard_after_forward=False"
            )

    def values(self, calls: tuple[Call, ...]) -> Tensor:
        """The product, and what was called on it since."""
        self.check()
        hidden, weight, bias = self._inputs
        assert hidden is not None
        assert weight is not None
        with torch.no_grad(), autocast_off(hidden.device):
            return _replay(F.linear(hidden, weight, bias), calls)


class LazyLogits(Tensor):
    """Logits of a head, to be computed when something other than a cross-entropy asks for their values.

    Cost: no memory beyond the hidden states that it holds; the logits' bytes from the moment they are computed.
    """

    _source: Source
    _calls: tuple[Call, ...]
    _terms: Terms | None
    _root: LazyLogits | None  # what these derive from; None for themselves, which would be a cycle
    _real: Tensor | None
    _clean: int

    @staticmethod
    def __new__(cls, source: Source, calls: tuple[Call, ...], shape: Any, dtype: torch.dtype) -> LazyLogits:
        device = source._inputs[0].device  # type: ignore[union-attr]
        self: LazyLogits = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self._source, self._calls, self._terms, self._root = source, calls, None, None
        self._real, self._clean = None, 0
        return self

    def __init__(self, *args: Any) -> None:
        """Everything is set in ``__new__``."""

    def derive(self, call: Call, terms: Terms, dtype: torch.dtype) -> LazyLogits:
        """What ``call`` makes of these logits: logits again, with these ``terms``."""
        root = self if self._root is None else self._root
        shape = (*terms.hidden.shape[:-1], terms.weight.shape[0])
        made: LazyLogits = _Derive.apply(root, self._source, (*self._calls, call), shape, dtype)  # type: ignore[no-untyped-call]
        made._terms, made._root = terms if torch.is_grad_enabled() else terms.detached(), root
        return made

    def detached(self) -> LazyLogits:
        """The same values without autograd."""
        made = LazyLogits(self._source, self._calls, self.shape, self.dtype)
        made._terms = None if self._terms is None else self._terms.detached()
        return made

    @property
    def terms(self) -> Terms | None:
        """How a loss can do without the values; None where it cannot, because someone changed or watches them.

        A graph of their own (an ``autograd.Function`` such as DDP's has returned them) counts as watching.
        """
        changed = self._real is not None and _version(self._real) != self._clean
        watched = self._backward_hooks or self.retains_grad
        known = self._terms
        if changed or watched or known is None or known.requires_grad != self.requires_grad:
            return None
        return known

    @property
    def is_computed(self) -> bool:
        """Whether the values exist."""
        return self._real is not None

    def ordinary(self) -> Tensor:
        """The ordinary tensor, computed at the first call; its gradient flows through this one."""
        connected = torch.is_grad_enabled() and self.requires_grad
        if self._real is None or (connected and not self._real.requires_grad):
            values = self.plain_values()
            self._clean = _version(values) if self._real is None else self._clean
            self._real = _Read.apply(self, values) if connected else values  # type: ignore[no-untyped-call]
        return self._real

    def plain_values(self) -> Tensor:
        """The values outside of autograd: those there are, or computed now and not kept."""
        if self._real is not None:
            return self._real.detach()
        return self._source.values(self._calls)

    def cross_entropy(self, terms: Terms, target: Tensor, **options: Any) -> Tensor:
        """``F.cross_entropy`` of logits with these terms, without the logits."""
        self._source.check()
        scale = terms.scale if terms.cap is None else terms.scale * terms.cap
        options = {**options, **self._source.options, "softcap": terms.cap}
        autocast = torch.is_autocast_enabled(self.device.type) and self.dtype in (torch.float16, torch.bfloat16)
        aside = _rows_aside(terms, target, options.get("chunk_bytes"))
        with autocast_off(self.device):
            loss: Tensor = linear_cross_entropy(
                terms.hidden, terms.weight, target, terms.bias, logit_scale=scale, **options
            )
        del aside
        return loss.to(torch.float32 if autocast else self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            lazy = args[0] if args and isinstance(args[0], LazyLogits) else None
            if func in ANSWERED:
                return func(*args, **kwargs)
            if func in STORAGE and lazy is not None and not lazy.is_computed:
                raise NotImplementedError("these logits have no storage: they have not been computed")
            terms = lazy.terms if lazy is not None and func in RULES else None
            if terms is not None:
                result = RULES[func](func, lazy, terms, *args[1:], **kwargs)
                if result is not NotImplemented:
                    return result
            args, kwargs = tree_map_only(LazyLogits, LazyLogits.ordinary, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Where torch itself works with these logits, below ``__torch_function__`` and autograd."""
        if func in (torch.ops.aten.clone.default, torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            (lazy,) = args
            if not lazy.is_computed:
                return LazyLogits(lazy._source, lazy._calls, lazy.shape, lazy.dtype)
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.plain_values, (args, kwargs or {}))
        return func(*args, **kwargs)


def lazy_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> LazyLogits:
    """``F.linear(hidden, weight, bias)``, to be computed when it is asked for.

    Args:
        hidden: (..., H), of the dtype of ``weight`` (V, H).
        bias: (V,) or None.
        options: for ``memopt.linear_cross_entropy``: ``chunk_bytes``, ``mode``, ``accumulate``, ``gradient_filter``.
    """
    terms = Terms(hidden, weight, bias)
    made: LazyLogits = _Product.apply(hidden, weight, bias, Source(terms, options))  # type: ignore[no-untyped-call]
    made._terms = terms if torch.is_grad_enabled() else terms.detached()
    return made


class _Product(torch.autograd.Function):
    """Logits from nothing; their gradient, should there ever be one, is that of ``F.linear``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, source: Source) -> LazyLogits:
        ctx.save_for_backward(hidden, weight)
        ctx.has_bias = bias is not None
        return LazyLogits(source, (), source.shape, hidden.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        wants = ctx.needs_input_grad
        with autocast_off(hidden.device):
            rows = gradient.reshape(-1, weight.shape[0])
            of_hidden = (rows @ weight).view_as(hidden) if wants[0] else None
            of_weight = rows.t() @ hidden.reshape(-1, weight.shape[1]) if wants[1] else None
            of_bias = rows.sum(0) if ctx.has_bias and wants[2] else None
        return of_hidden, of_weight, of_bias, None


class _Derive(torch.autograd.Function):
    """Logits from the product's; their gradient goes back through the calls between, on values made for it."""

    @staticmethod
    def forward(
        ctx: Any, root: LazyLogits, source: Source, calls: tuple[Call, ...], shape: Any, dtype: torch.dtype
    ) -> LazyLogits:
        ctx.source, ctx.calls, ctx.dtype = source, calls, root.dtype
        return LazyLogits(source, calls, shape, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if any(func in (torch.tanh, Tensor.tanh) for func, _, _ in ctx.calls):
            start = ctx.source.values(())
        else:  # the other calls are linear: their gradients do not depend on values
            start = torch.zeros((), dtype=ctx.dtype, device=gradient.device).expand(ctx.source.shape)
        start = start.detach().requires_grad_()
        with torch.enable_grad(), autocast_off(gradient.device):
            end = _replay(start, ctx.calls)
        return (*torch.autograd.grad(end, start, gradient), None, None, None, None)


class _Read(torch.autograd.Function):
    """The ordinary tensor of lazy logits."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyLogits, values: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _rows_aside(terms: Terms, target: Tensor, chunk_bytes: int | None) -> Tensor | None:
    """For a trace: the copies that the loss makes of the rows that count and of their gradient, a chunk of each.

    It makes none where all rows count, and a trace cannot know. But the labels that models shift by themselves ignore
    the last position of every sequence.
    """
    if not values_unknown(target):
        return None
    rows, (V, H) = terms.hidden.shape[0], terms.weight.shape
    chunk = (chunk_bytes or DEFAULT_CHUNK_BYTES) // ((V + 2 * H) * terms.hidden.element_size())
    return terms.hidden.new_empty(2, max(1, min(rows, chunk)), H)


def _replay(value: Tensor, calls: tuple[Call, ...]) -> Tensor:
    for func, args, kwargs in calls:
        value = func(value, *args, **kwargs)
    return value


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _is_freed(weight: Tensor) -> bool:
    return weight.numel() > 0 and weight.untyped_storage().nbytes() == 0 and not weight.is_meta
