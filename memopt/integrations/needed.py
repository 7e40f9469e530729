"""Libraries that an integration cannot do without, and how to get them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(library: str, extra: str) -> Iterator[None]:
    """Around the import of a library: where it is not installed, say which of memopt's extras brings it.

    Raises:
        ModuleNotFoundError: the library is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != library:
            raise
        raise ModuleNotFoundError(
            f"this part of memopt works with {library}, which is not installed: pip install 'memopt[{extra}]'",
            name=library,
        ) from error
