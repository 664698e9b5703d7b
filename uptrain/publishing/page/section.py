"""The parts of the page: section, chart and sample."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Chart:
    """A chart.

    - `name`: the name in its file and its ids.
    - `figure`: the matplotlib figure.
    - `says`: a description for readers who can't see it.
    - `caption`: the line above it.
    """

    name: str
    figure: Figure
    says: str
    caption: str = ""


@dataclass(frozen=True)
class Quote:
    """A prompt, and what each model wrote after it, by the model's name."""

    prompt: str
    written: list[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """A section of the page.

    - `title`, `text`: its heading and its introduction.
    - `charts`: its charts.
    - `columns`, `rows`: its table.
    - `missing`: sentences on what it can't show and how to add it.
    - `quotes`: its samples.
    """

    title: str
    text: str
    charts: list[Chart] = field(default_factory=list)
    columns: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    quotes: list[Quote] = field(default_factory=list)


ORIGINAL = "the original"
"""The name of the baseline on the page."""


def slug(name: str) -> str:
    """Return a checkpoint's name in the characters of ids and file names."""
    return re.sub(r"[^\w.-]", lambda found: f"_{ord(found[0]):x}", name, flags=re.ASCII)
