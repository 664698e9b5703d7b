"""The lists of eval.json as tables, with the same words in the terminal, the report and a model card.

The file may be of another version: a metric that is missing, or is not a number, becomes a dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from uptrain.formatting import number

_PARTS = ("rows", "tasks", "needle", "samples", "speeds")


@dataclass(frozen=True)
class MetricTable:
    """A table of text: the names of the columns, and rows with one cell per column."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def rows_of(found: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """Return the list `name` of an evaluation; empty where it has no such list."""
    listed = (found or {}).get(name)
    return [each for each in listed if isinstance(each, Mapping)] if isinstance(listed, list | tuple) else []


def number_in(row: Mapping[str, Any], name: str) -> float | None:
    """Return a number of a row; None where it is missing or not finite."""
    value = row.get(name)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def interval_in(row: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """Return an interval or a range of a row; None where it is missing or not finite."""
    ends = row.get(name)
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return None
    low, high = (number_in({"": end}, "") for end in ends)
    return None if low is None or high is None else (low, high)


def run_of(found: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """Return the run that measured `part` (quality or speed); empty where none was recorded."""
    runs, parts = found.get("runs"), found.get("parts")
    at = parts.get(part) if isinstance(parts, Mapping) else None
    listed = runs if isinstance(runs, list | tuple) else []
    run = listed[at] if isinstance(at, int) and 0 <= at < len(listed) else None
    return run if isinstance(run, Mapping) else {}


def weights_of(found: Mapping[str, Any]) -> str:
    """Return the digest of the measured weights; empty where none was recorded."""
    return str(run_of(found, "quality").get("weights") or "")


def stale_parts(found: Mapping[str, Any] | None) -> list[str]:
    """Return the parts that have entries of other weights or of another baseline."""
    stale = (found or {}).get("stale")
    return [part for part in _PARTS if isinstance(stale, Mapping) and rows_of(stale, part)]


def by_text(found: Mapping[str, Any]) -> MetricTable:
    """Return a row per text and context: quality of the model and of its baseline."""
    columns: tuple[str, ...] = ("text", "context", "perplexity", "original's", "KL, nats", "top-1", "top-5", "flips")
    rows: list[tuple[str, ...]] = [
        (
            PurePath(str(row.get("text", ""))).name, _whole(row, "context"), _plain(row, "perplexity", "{:.2f}"),
            _plain(row, "baseline_perplexity", "{:.2f}"), _ranged(row, "kl", "{:#.3g}", "kl_interval"),
            _plain(row, "top1_agreement", "{:.1%}"), _plain(row, "top5_agreement", "{:.1%}"),
            _plain(row, "flip_rate", "{:.2%}"),
        )
        for row in rows_of(found, "rows")
    ]  # fmt: skip
    conditions = [_conditions(row) for row in rows_of(found, "rows")]
    places = [row[:2] for row in rows]
    if len({*places}) < len(places):  # one text and context was measured under several conditions
        columns = (*columns[:2], "tokens, stride", *columns[2:])
        rows = [(*row[:2], condition, *row[2:]) for row, condition in zip(rows, conditions, strict=True)]
    return MetricTable(columns, rows)


def _conditions(row: Mapping[str, Any]) -> str:
    return f"{_whole(row, 'tokens')}, {_whole(row, 'stride')}"


def tasks(found: Mapping[str, Any], model: str, baseline: str | None) -> MetricTable:
    """Return a row per metric of each task, with standard errors; `model` and `baseline` name the columns of scores."""
    alone = [
        (str(row.get("task", "")), task_metric_name(row), _whole(row, "samples"), _with_error(row, "value", "stderr"))
        for row in rows_of(found, "tasks")
    ]
    if baseline is None:
        return MetricTable(("task", "metric", "samples", model), list(alone))
    against = [
        (_with_error(row, "baseline_value", "baseline_stderr"), _between(interval_in(row, "difference_interval")))
        for row in rows_of(found, "tasks")
    ]
    rows: list[tuple[str, ...]] = [
        (*row[:3], base, row[3], apart) for row, (base, apart) in zip(alone, against, strict=True)
    ]
    return MetricTable(("task", "metric", "samples", baseline, model, "difference, 95 %"), rows)


def task_metric_name(row: Mapping[str, Any]) -> str:
    """Return the name of a task's metric, with lm-eval's filter where one was used."""
    metric, chosen = str(row.get("metric", "")), str(row.get("filter") or "none")
    return metric if chosen == "none" else f"{metric}, {chosen}"


def needle(found: Mapping[str, Any], model: str, baseline: str | None) -> MetricTable:
    """Return a row per length and depth: share of keys found, with its interval, and nats per token of the key."""
    columns: tuple[str, ...] = ("length", "depth", "samples")
    rows: list[tuple[str, ...]] = [
        (_whole(row, "length"), _plain(row, "depth", "{:.0%}"), _whole(row, "samples"))
        for row in rows_of(found, "needle")
    ]
    for name, of in ((baseline, "baseline_"), (model, "")):
        if name is not None:
            columns = (*columns, f"{name}: found", "log p")
            rows = [
                (*row, _ranged(cell, f"{of}exact_match", "{:.0%}", f"{of}exact_match_interval"),
                 _plain(cell, f"{of}log_probability", "{:.2f}"))
                for row, cell in zip(rows, rows_of(found, "needle"), strict=True)
            ]  # fmt: skip
    return MetricTable(columns, rows)


def speeds(found: Mapping[str, Any], model: str, baseline: str | None) -> MetricTable:
    """Return a row per batch size and context: median, slowest and fastest tokens per second of all sequences."""
    places: list[tuple[str, ...]] = []
    for row in rows_of(found, "speeds"):
        cells = [_whole(row, "batch"), _whole(row, "context")]
        for part in ("prefill", "decode"):
            for name, of in ((baseline, "baseline_"), (model, "")):
                if name is not None:
                    cells.append(_ranged(row, f"{of}{part}_tokens_per_second", "{:,.0f}", f"{of}{part}_range"))
        if baseline is not None:
            cells.append(_ranged(row, "decode_ratio", "{:.2f}", "decode_ratio_range"))
        places.append(tuple(cells))
    if baseline is None:
        return MetricTable(("batch", "context", "prefill", "decode"), places)
    return MetricTable(
        ("batch", "context", f"prefill: {baseline}", model, f"decode: {baseline}", model, "times it"), places
    )


def _plain(row: Mapping[str, Any], name: str, form: str) -> str:
    return number(number_in(row, name), form)


def _whole(row: Mapping[str, Any], name: str) -> str:
    return number(number_in(row, name), "{:,.0f}")


def _ranged(row: Mapping[str, Any], name: str, form: str, ends: str) -> str:
    return number(number_in(row, name), form, interval_in(row, ends))


def _with_error(row: Mapping[str, Any], name: str, error: str) -> str:
    stderr = number_in(row, error)
    return _plain(row, name, "{:.4g}") + ("" if stderr is None else f" ± {stderr:.2g}")


def _between(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else " to ".join(f"{end:+.4g}" for end in interval)
