"""The page's section on retrieval: how often a hidden pass key is found, by prompt length and key depth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uptrain.evaluation.tables import needle, number_in
from uptrain.publishing.page.models import PageModel, table_of
from uptrain.publishing.page.section import ORIGINAL, Chart, Section
from uptrain.publishing.page.style import INK, MUTED, SERIES, WIDTH

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """One model's cells: by length and depth, the share of keys found and the key's nats per token."""

    name: str
    cells: Mapping[tuple[int, float], tuple[float, float]]


def retrieval(models: list[PageModel]) -> Iterator[Section]:
    """Yield the section if retrieval was measured. Call it inside `style.drawing`."""
    asked = [model for model in models if model.rows("needle")]
    panels = list(_panels(asked))
    if not panels:
        return
    samples = sorted({f"{each:,.0f}" for model in asked for row in model.rows("needle")
                      if (each := number_in(row, "samples")) is not None})  # fmt: skip
    found = any(exact for panel in panels for exact, _ in panel.cells.values())
    text = (
        "A pass key is hidden in text at some depth, and asked for at the end of the prompt. Each cell has the share "
        f"of keys that greedy decoding writes, of {' or '.join(samples)} prompts, and below it the mean "
        "log-probability of the key's tokens, in nats. "
    )
    text += (
        "A stronger colour means that more keys are found."
        if found
        else "No key was found; a stronger colour means that its tokens are likelier."
    )
    table = table_of(asked, lambda found: needle(found, "this", ORIGINAL))
    says = "Keys found by depth and length, one map per model; the table has the values."
    yield Section("Retrieval", text, [Chart("retrieval", retrieval_chart(panels), says)], table.columns, table.rows)


def _panels(models: Sequence[PageModel]) -> Iterator[Panel]:
    """Yield the panel of each model, after that of its original, without repetition."""
    seen: list[Panel] = []
    for model in models:
        for name, of in ((ORIGINAL, "baseline_"), (model.name, "")):
            panel = Panel(name, dict(_cells(model.rows("needle"), of)))
            if panel.cells and panel not in seen:
                seen.append(panel)
                yield panel


def _cells(rows: Sequence[Mapping[str, Any]], of: str) -> Iterator[tuple[tuple[int, float], tuple[float, float]]]:
    for row in rows:
        length, depth = number_in(row, "length"), number_in(row, "depth")
        exact, nats = number_in(row, f"{of}exact_match"), number_in(row, f"{of}log_probability")
        if length is not None and depth is not None and exact is not None and nats is not None:
            yield (int(length), depth), (exact, nats)


def retrieval_chart(panels: Sequence[Panel]) -> Figure:
    """Draw the panels: lengths to the right, depths downwards."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    lengths = sorted({length for panel in panels for length, _ in panel.cells})
    depths = sorted({depth for panel in panels for _, depth in panel.cells})
    across = 2 if len(panels) > 1 and len(lengths) <= 5 else 1
    below = math.ceil(len(panels) / across)
    figure = Figure(figsize=(WIDTH, below * (0.85 + 0.4 * len(depths))), layout="constrained")
    FigureCanvasAgg(figure)
    panes = figure.subplots(below, across, squeeze=False).flatten()
    found = any(exact for panel in panels for exact, _ in panel.cells.values())
    likely = [nats for panel in panels for _, nats in panel.cells.values()]
    least, most = min(likely), max(likely)
    for axes, panel in zip(panes, panels, strict=False):
        for (length, depth), (exact, nats) in panel.cells.items():
            at = (lengths.index(length), depths.index(depth))
            shade = exact if found else (nats - least) / ((most - least) or 1)
            axes.add_patch(Rectangle((at[0] - 0.47, at[1] - 0.46), 0.94, 0.92, color=SERIES[0],
                                     alpha=0.06 + 0.54 * shade, linewidth=0))  # fmt: skip
            axes.annotate(f"{exact:.0%}", at, (0, 1), textcoords="offset points", ha="center", va="bottom", color=INK)
            # Rounding would leave a sign on zero.
            sure = f"{round(nats, 1) + 0.0:.1f}"
            axes.annotate(sure, at, (0, -2), textcoords="offset points", ha="center", va="top", color=MUTED,
                          fontsize=7.5)  # fmt: skip
        axes.set_title(panel.name, fontsize=9.5, color=INK)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_xlim(-0.5, len(lengths) - 0.5)
        axes.set_ylim(len(depths) - 0.5, -0.5)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("prompt, tokens")
        axes.set_ylabel("depth of the key")
    for axes in panes[len(panels) :]:
        axes.set_visible(False)
    return figure
