"""Report how far each part of an evaluation is."""

from __future__ import annotations

from collections.abc import Callable

from uptrain.checkpoint.events import Events


def counted(part: str, total: int, events: Events) -> Callable[[int], None]:
    """Return a function that adds a count to what is done of `part` and reports it to `events.part`."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        events.part(part, done, total)

    return advance
