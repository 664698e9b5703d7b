"""Have the C library give freed memory back to the system, where it would keep much of it for later (glibc)."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LARGE = 2**19
"""Bytes from which an array is worth a system call of its own."""
_TRIM, _OWN_MAP = -1, -3
"""glibc's names of two settings: what may stay unused at the heap's end, and from what size on memory is mapped."""
_GROWN = 2**25
"""What glibc lets the second grow to by itself; the first is twice that."""


def give_back() -> None:
    """Give back what is free now."""
    library = _library()
    if library is not None:
        library.malloc_trim(0)


@contextmanager
def giving_back() -> Iterator[None]:
    """Give back large arrays as soon as they are freed, which costs time: the system clears each new one's pages.

    Where arrays of many sizes come and go, what is kept for later is half as much again as what is used. The settings
    are the process's; afterwards they are what glibc sets by itself where large arrays are freed.
    """
    library = _library()
    if library is None:
        yield
        return
    library.mallopt(_OWN_MAP, LARGE)
    library.mallopt(_TRIM, 2 * LARGE)
    try:
        yield
    finally:
        library.mallopt(_OWN_MAP, _GROWN)
        library.mallopt(_TRIM, 2 * _GROWN)


def _library() -> Any:
    """Return the C library this process runs with if it is glibc, else None."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
