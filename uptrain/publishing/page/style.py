"""The style of charts: as SVG in a page, where CSS sets the colours, and as PNG on white."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from uptrain.training import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1c2430", "#5c6675", "#dfe3e8"
SERIES = ("#2563c9", "#c2570c", "#0d8a7b", "#7a4fd0", "#b0246f", "#5f7a12")
_VARIABLES = {
    INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)",
    **{colour: f"var(--c{number})" for number, colour in enumerate(SERIES, 1)},
}  # fmt: skip
"""The CSS variable of each colour. The page's style sheet has a light and a dark value."""
WIDTH = 6.0
DPI = 160


def settings() -> Any:
    """Return the style as matplotlib settings, for `plt.rcParams.update` in a notebook."""
    from cycler import cycler

    return {
        "font.size": 9.5, "font.family": "sans-serif", "svg.fonttype": "none", "text.parse_math": False,
        "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": MUTED, "xtick.color": MUTED,
        "ytick.color": MUTED, "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True, "lines.linewidth": 2,
        "lines.markersize": 5, "legend.frameon": False, "svg.hashsalt": "uptrain",
        "axes.prop_cycle": cycler(color=SERIES),
    }  # fmt: skip


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in the report's style. Afterwards, matplotlib has its earlier settings.

    Raises:
        UsageError: matplotlib is not installed.
    """
    plots.check()
    import matplotlib

    with matplotlib.rc_context(settings()):
        yield


def new_figure(height: float) -> tuple[Figure, Any]:
    """Return a figure `height` inches high, and its axes."""
    # Needs no display, and leaves pyplot's state in a notebook alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def svg(figure: Figure, name: str) -> str:
    """Return a chart as an SVG element for HTML: with its own ids, the page's colours, and no address."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\sid="', rf' id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    head, body = text.split(">", 1)
    # The page's style sheet sets the size.
    return re.sub(r'\s(width|height)="[^"]*"', "", head) + ">" + body


def png(figure: Figure) -> bytes:
    """Return a chart as PNG on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()
