"""How far each part of a measurement is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def counted(what: str, total: int, on_progress: Progress | None) -> Callable[[int], None]:
    """Return what tells `on_progress` that so much more is done."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(what, done, total)

    return advance
