"""Numbers as people read them, and names as they type them."""

from __future__ import annotations

import shlex
from pathlib import Path


def size(count: float) -> str:
    """Return a number of bytes with its unit: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: 1 step, 2,000 steps. `plural` is needed where it is not `noun` with an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """Return a rough time as people say it: 40 seconds, 12 minutes, 3 hours."""
    length, unit = (1, "second") if seconds < 90 else (60, "minute") if seconds < 5400 else (3600, "hour")
    return counted(max(1, round(seconds / length)), unit)


def tokens(count: int) -> str:
    """Return a number of tokens with its unit, K or M: 64 K."""
    return f"{count // 2**20} M" if count >= 2**20 else f"{count // 1024} K"


def number(value: float | None, form: str, ends: tuple[float, float] | None = None) -> str:
    """Return `value` formatted by `form`, with its interval `ends` in brackets; a dash for None."""
    if value is None:
        return "–"
    return form.format(value) + (f" ({form.format(ends[0])} to {form.format(ends[1])})" if ends else "")


def typed(name: str | Path) -> str:
    """Return a name as a shell reads it: in quotes if it has a space or a special character."""
    return shlex.quote(str(name))
