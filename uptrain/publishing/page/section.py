"""What a part of the page is made of."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Chart:
    """A picture, the name its file and its ids have, what it shows, for those who can't see it, and a line above it."""

    name: str
    figure: Figure
    says: str
    caption: str = ""


@dataclass(frozen=True)
class Quote:
    """A prompt, and by name what each model wrote after it."""

    prompt: str
    written: list[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """A part of the page; `missing` says what it can't show, and how to get it."""

    title: str
    text: str
    charts: list[Chart] = field(default_factory=list)
    columns: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    quotes: list[Quote] = field(default_factory=list)


ORIGINAL = "the original"
"""What the baseline is called on the page."""


def slug(name: str) -> str:
    """Return a checkpoint's name as it can stand in an id and a file's name."""
    return re.sub(r"[^\w.-]", lambda found: f"_{ord(found[0]):x}", name, flags=re.ASCII)
