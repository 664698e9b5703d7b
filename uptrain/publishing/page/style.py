"""How pictures look: once in a page that may be dark, where CSS colours them, and once on white paper."""

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
"""What each colour is called in the page's style sheet, which knows a light and a dark one."""
WIDTH = 6.0
DPI = 160


def settings() -> Any:
    """Return the report's style as matplotlib settings; a notebook gives them to `plt.rcParams.update`."""
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
    """Draw in the report's style; the settings of a notebook that draws too come back afterwards.

    Raises:
        UsageError: matplotlib is not installed.
    """
    plots.check()
    import matplotlib

    with matplotlib.rc_context(settings()):
        yield


def new_figure(height: float) -> tuple[Figure, Any]:
    """Return a figure `height` inches high, and its axes."""
    # Without a display, and without touching the state of a notebook that draws too.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def svg(figure: Figure, name: str) -> str:
    """Return a picture as an SVG element to stand in HTML: ids of its own, colours by the page, no address in it."""
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
    # The page's style sheet sets the size, from the view box.
    return re.sub(r'\s(width|height)="[^"]*"', "", head) + ">" + body


def png(figure: Figure) -> bytes:
    """Return a picture as PNG on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()
