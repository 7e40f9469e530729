"""Writing a file so that it appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Writes beside the target (text as UTF-8) and renames; a failure leaves an earlier file as it was.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; it names ``path``.
    """
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        partial.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuses a ``path`` that cannot be written, before the work that would fill it.

    Raises:
        ValueError: it is a folder, or its own folder is missing or not writable.
    """
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"cannot write {str(target)!r}: it is a folder")
    if not target.parent.is_dir():
        raise ValueError(f"cannot write {str(target)!r}: there is no folder {str(target.parent)!r}")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"cannot write {str(target)!r}: folder {str(target.parent)!r} is not writable")
