"""The page's section on speed: decoding of one sequence, and of every batch and context that was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from uptrain.evaluation.tables import interval_in, number_in, run_of, speeds
from uptrain.formatting import number, typed
from uptrain.publishing.page import charts
from uptrain.publishing.page.models import PageModel, table_of
from uptrain.publishing.page.section import ORIGINAL, Chart, Section, slug
from uptrain.publishing.page.style import MUTED, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
"""The line styles of the batch sizes, the smallest first."""


def speed(models: list[PageModel]) -> Section:
    """Return the section on speed. Call it inside `style.drawing`."""
    timed = [model for model in models if model.metric("decode_tokens_per_second", "model") is not None]
    missing = [
        f"The speed of {model.name} was not measured: uptrain eval {typed(model.folder)}, without --no-speed."
        for model in models if model not in timed
    ]  # fmt: skip
    if not timed:
        return Section("Decode speed", "", missing=missing)
    found = timed[0].evaluation or {}
    device = run_of(found, "speed").get("device") or found.get("device", "")
    text = (
        f"One sequence after {number(timed[0].metric('speed_context'), '{:,.0f}')} tokens, "
        f"{found.get('speed_dtype', '')} on {device}; medians of alternating runs, whiskers from "
        "slowest to fastest. A smaller cache makes decoding faster if reading it takes long: with long contexts and "
        "large batches."
    )
    drawn = [Chart("speed", charts.speed(timed), "Decoded tokens per second of each result and of its original.")]
    for model in timed:
        if len({number_in(row, "context") for row in model.rows("speeds")} - {None}) > 1:
            says = f"Decoded tokens per second of {model.name} and of its original against the context, by batch."
            drawn.append(Chart(f"decode-{slug(model.name)}", decode_chart(model), says, model.name * (len(timed) > 1)))
    table = table_of(timed, lambda found: speeds(found, "this", ORIGINAL))
    if table.rows:
        text += " The table has tokens per second of all sequences of a batch together."
    return Section("Decode speed", text, drawn, table.columns, table.rows, missing)


def decode_chart(model: PageModel) -> Figure:
    """Draw decoded tokens per second against the context: a colour per model, a line style per batch size."""
    found, axes = new_figure(3.4)
    rows = model.rows("speeds")
    batches = sorted({each for row in rows if (each := number_in(row, "batch")) is not None})
    contexts = sorted({each for row in rows if (each := number_in(row, "context")) is not None})
    heights: list[float] = []
    for batch, dash in zip(batches, _DASHES * len(batches), strict=False):
        own = [row for row in rows if number_in(row, "batch") == batch and number_in(row, "context") is not None]
        mine = sorted(own, key=lambda row: float(row["context"]))
        # Shift each line a little, so that the bars of one context don't cover each other.
        for name, of, colour, aside in ((ORIGINAL, "baseline_", MUTED, 1.0), (model.name, "", SERIES[0], 1.03)):
            points = list(_points([(row["context"] * aside, number_in(row, f"{of}decode_tokens_per_second"),
                                    interval_in(row, f"{of}decode_range")) for row in mine]))  # fmt: skip
            if not points:
                continue
            at, values, low, high = zip(*points, strict=True)
            heights += values
            axes.errorbar(at, values, yerr=(low, high), color=colour, linestyle=dash, marker="o", markersize=4,
                          capsize=3, linewidth=1.8, elinewidth=1.1, label=f"{name}, batch {batch:.0f}")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,.0f}" for context in contexts])
    axes.minorticks_off()
    if heights and max(heights) > 5 * min(heights):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.0f}")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens before decoding")
    axes.set_ylabel("decoded tokens per second")
    found.legend(loc="outside upper center", ncols=2, fontsize=8.5, handlelength=3.5)
    return found


def _points(
    cells: Sequence[tuple[float, float | None, tuple[float, float] | None]],
) -> Iterator[tuple[float, float, float, float]]:
    """Yield context, speed, and the distances down to the slowest and up to the fastest run."""
    for context, value, ends in cells:
        if value is not None:
            low, high = ends or (value, value)
            yield context, value, value - low, high - value
