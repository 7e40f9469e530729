"""Training on a part of each parameter's elements: the part as a compact stand-in, filled only during the step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from memopt.optim.coverage.nested import Nested, Seat
from memopt.optim.gradients import require_dense
from memopt.optim.sharding import is_sharded, like, local_of

CHUNK_BYTES = 64 * 2**20
"""Stand-ins are filled for about this many bytes of parameters at a time, so that the copies stay small."""

_WHOLE_TENSOR = ("Muon", "LBFGS", "Adafactor")  # torch's optimizers whose update of an element depends on others


def stand_in(
    param: Tensor, shape: tuple[int, ...], local_shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> Tensor:
    """A parameter of the given shape that takes no memory until :func:`fill`; sharded by rows as ``param`` is."""
    blank = torch.zeros((), dtype=dtype or param.dtype, device=local_of(param).device).expand(local_shape)
    return torch.nn.Parameter(like(param, blank, shape))


def fill(one: Tensor, local: Tensor) -> None:
    """Put a stand-in's (local) values in place, or take them away with the value of ``blank``."""
    if is_sharded(one):
        cast(Any, one)._local_tensor = local
    else:
        one.data = local


def blank(one: Tensor) -> Tensor:
    """What a stand-in holds between steps: one element seen from everywhere."""
    local = local_of(one)
    return torch.zeros((), dtype=local.dtype, device=local.device).expand(local.shape)


def require_elementwise(base: type[torch.optim.Optimizer], coverage: str) -> None:
    """Refuse an optimizer whose update of an element depends on other elements of the parameter.

    Raises:
        ValueError: it is such an optimizer.
    """
    if not getattr(base, "elementwise", base.__name__ not in _WHOLE_TENSOR):
        raise ValueError(
            f"{coverage} cuts parameters apart, but {base.__name__} looks at whole ones (norms, rows or "
            "matrices); use Split(by='blocks') or BlockCoordinate, which leave them whole, or an element-wise rule"
        )


def in_chunks(seats: Iterable[Seat]) -> Iterator[list[Seat]]:
    """Seats in runs of about ``CHUNK_BYTES`` of stand-ins."""
    chunk: list[Seat] = []
    size = 0
    for seat in seats:
        nbytes = local_of(seat.stand_in).numel() * seat.stand_in.element_size()
        if chunk and size + nbytes > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(seat)
        size += nbytes
    if chunk:
        yield chunk


class Partial(Nested):
    """What coverages of parts of parameters share: filling stand-ins for the time of the inner step."""

    def _start_values(self, seat: Seat) -> Tensor:
        """The local values of a seat's stand-in before the step."""
        raise NotImplementedError

    def _start_gradient(self, seat: Seat) -> Tensor:
        """The local values of its gradient."""
        raise NotImplementedError

    def _finish(self, seat: Seat) -> None:
        """Put what the step made of the stand-in into the parameter."""
        raise NotImplementedError

    def _require_dense(self) -> None:
        """Refuse sparse gradients before anything changes."""
        require_dense(self._named.values(), type(self).__name__)

    def _step_parts(self) -> None:
        """The inner step for every seat whose parameter has a gradient."""
        ready = [seat for seat in self._occupied if seat.param.grad is not None]
        whole = [seat for seat in ready if seat.stand_in is seat.param]
        parts = [seat for seat in ready if seat.stand_in is not seat.param]
        hidden = [seat.param.grad for seat in whole]
        for number, chunk in enumerate(in_chunks(parts)):
            if number == 1:
                for seat in whole:  # they took their step with the first chunk
                    seat.param.grad = None
            for seat in chunk:
                fill(seat.stand_in, self._start_values(seat))
                seat.stand_in.grad = like(seat.param, self._start_gradient(seat), tuple(seat.stand_in.shape))
            self._inner_step()
            for seat in chunk:
                self._finish(seat)
                seat.stand_in.grad = None
                fill(seat.stand_in, blank(seat.stand_in))
        if not parts and whole:
            self._inner_step()
        for seat, grad in zip(whole, hidden, strict=True):
            seat.param.grad = grad

    def _initialise(self) -> None:
        for seat in self._occupied:
            if seat.stand_in is not seat.param:
                fill(seat.stand_in, torch.zeros_like(local_of(seat.stand_in)))
        super()._initialise()
        for seat in self._occupied:
            if seat.stand_in is not seat.param:
                fill(seat.stand_in, blank(seat.stand_in))
