"""The page's section on quality: perplexity against cache bytes, and the loss by context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from uptrain.evaluation.tables import by_text, interval_in, number_in
from uptrain.formatting import typed
from uptrain.publishing.page import charts
from uptrain.publishing.page.models import PageModel, table_of
from uptrain.publishing.page.section import Chart, Section
from uptrain.publishing.page.style import INK, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL = "all"
"""The name of the row of all texts together."""


def quality(models: list[PageModel]) -> Section:
    """Return the section on quality. Call it inside `style.drawing`."""
    compared = [model for model in models if model.metric("perplexity", "baseline") is not None]
    missing = [
        f"{model.name} was not measured against its original: uptrain eval {typed(model.folder)}"
        for model in models if model not in compared
    ]  # fmt: skip
    missing += [sentence for model in models for sentence in model.left_out]
    comparable = [model for model in compared if model.conditions == compared[0].conditions]
    missing += [
        f"{model.name} was measured on other text or with other settings than {comparable[0].name}, so it is not drawn."
        for model in compared if model not in comparable
    ]  # fmt: skip
    if not comparable:
        return Section("Quality against cache", "", missing=missing)
    how = ", ".join(_conditions(comparable[0].evaluation or {}))
    text = f"Lower and further left is better. {how}. Bars: 95 % intervals of the perplexity ratio over windows."
    says = "Perplexity against cache bytes per token, of the original and of each result; the table has the values."
    drawn = [Chart("quality", charts.quality(comparable), says)]
    lines = list(_lines(comparable))
    if any(len(rows) > 1 for _, rows in lines):
        text += " The second chart has the ratio at every context: the loss of a smaller cache may grow with length."
        says = "Perplexity over the original's against the context, one line per text or checkpoint."
        drawn.append(Chart("contexts", contexts_chart(lines), says))
    table = table_of(comparable, by_text)
    return Section("Quality against cache", text, drawn, table.columns, table.rows, missing)


def _conditions(found: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(found.get("tokens"), int):
        yield f"{found['tokens']:,} tokens" + (f" in {found['windows']:,} windows" if found.get("windows") else "")
    for key in ("context", "stride"):
        if isinstance(found.get(key), int):
            yield f"{key} {found[key]:,}"
    if found.get("dtype"):
        yield f"{found['dtype']} on {found.get('device')}"


Line = tuple[str, list[Mapping[str, Any]]]
"""A name and its rows of eval.json, one per context."""


def _lines(models: Sequence[PageModel]) -> Iterator[Line]:
    """Yield a line for each text of one model, or for each of several models on all texts."""
    for model in models:
        texts: dict[str, list[Mapping[str, Any]]] = {}
        for row in model.rows("rows"):
            if number_in(row, "perplexity_ratio") is not None and number_in(row, "context") is not None:
                texts.setdefault(str(row.get("text", "")), []).append(row)
        if len(models) > 1:
            whole = texts.get(ALL) or next(iter(texts.values()), [])
            yield model.name, whole
        else:
            yield from ((name.rpartition("/")[2], rows) for name, rows in texts.items())


def contexts_chart(lines: Sequence[Line]) -> Figure:
    """Draw the perplexity ratio against the context, with its 95 % interval, one line per name."""
    found, axes = new_figure(3.2)
    contexts = sorted({int(row["context"]) for _, rows in lines for row in rows})
    for number, (name, rows) in enumerate(lines):
        colour = SERIES[number % len(SERIES)]
        rows = sorted(rows, key=lambda row: int(row["context"]))
        heights = [float(row["perplexity_ratio"]) for row in rows]
        ends = [interval_in(row, "perplexity_ratio_interval") or (height, height)
                for row, height in zip(rows, heights, strict=True)]  # fmt: skip
        away = ([height - low for (low, _), height in zip(ends, heights, strict=True)],
                [high - height for (_, high), height in zip(ends, heights, strict=True)])  # fmt: skip
        # Shift each line a little, so that the bars of one context don't cover each other.
        axes.errorbar([row["context"] * 1.03**number for row in rows], heights, yerr=away, color=colour, marker="o",
                      markersize=4, capsize=3, linewidth=1.6, elinewidth=1.1, label=name)  # fmt: skip
    axes.axhline(1, color=INK, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("perplexity, times the original's")
    found.legend(loc="outside upper center", ncols=3, fontsize=8.5)
    return found
