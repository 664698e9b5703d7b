"""Give freed memory back to the system, where the C library keeps it for later."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Return what was freed to the system; nothing where the C library has no call for it.

    glibc keeps freed arrays of up to 32 MiB, for each thread its own: together more than a large layer takes.
    """
    _trim()(0)


@cache
def _trim() -> Callable[[int], int]:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return lambda pad: 0
    return found
