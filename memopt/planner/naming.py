"""How messages name things: what a name that is not known may have meant, and the user's line that something is at."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from types import FrameType, TracebackType

_OWN = str(Path(__file__).parents[1]) + os.sep
_LIBRARIES = tuple(
    {str(Path(sysconfig.get_path(name))) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


def unknown(what: str, name: str, known: Iterable[str], rest: str = "") -> str:
    """``unknown model 'gtp2' (did you mean gpt2?); choose ...``: the nearest names first, then all of them."""
    names = list(known)
    near = get_close_matches(name.lower(), names, n=2, cutoff=0.6)
    meant = f" (did you mean {' or '.join(near)}?)" if near else ""
    return f"unknown {what} {name!r}{meant}; choose {', '.join(names)}{rest}"


def users_line(place: TracebackType | FrameType | None, entry: str = "") -> str:
    """``file.py:12`` of the innermost frame that is neither memopt's nor an installed library's; "" where none is.

    From a frame it looks outwards as far as the file ``entry``: at what memopt runs, not at who calls it.
    """
    if isinstance(place, FrameType):
        outwards = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(place))
        frames = list(takewhile(lambda frame: frame[0] != entry, outwards))
    else:
        frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(place)][::-1]
    for file, line in frames:
        if not file.startswith((_OWN, *_LIBRARIES, "<")):
            return f"{Path(file).name}:{line}"
    return ""
