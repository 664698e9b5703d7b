"""Read eval.json for a card, tolerantly: what it lacks, or holds in another shape, is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uptrain.checkpoint.jsonfile import read_json
from uptrain.checkpoint.manifest import EVALUATION
from uptrain.errors import CheckpointError
from uptrain.evaluation.tables import (
    MetricTable,
    by_text,
    needle,
    number_in,
    rows_of,
    speeds,
    task_metric_name,
    tasks,
    weights_of,
)

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

# Each figure's name and place, how it is written, and by what name the Hub's metadata knows it, if at all.
_OF_EACH = (
    ("perplexity", "perplexity", "{:,.3f}", "perplexity"),
    ("bits per byte", "bits_per_byte", "{:.4f}", "bits_per_byte"),
    ("cache bytes per token, measured", "cache_bytes_per_token", "{:,.0f}", ""),
    ("prefill, tokens/s", "prefill_tokens_per_second", "{:,.0f}", ""),
    ("decode, tokens/s", "decode_tokens_per_second", "{:,.0f}", ""),
)
_OF_BOTH = (
    ("perplexity, times the original's", "perplexity_ratio", "{:.4f}", "perplexity_ratio"),
    ("KL from the original, nats per token", "kl", "{:.4g}", "kl_divergence"),
    ("top-1 agreement with the original", "top1_agreement", "{:.1%}", "top1_agreement"),
    ("top-5 agreement with the original", "top5_agreement", "{:.1%}", "top5_agreement"),
    ("flips, tokens only one ranks first rightly", "flip_rate", "{:.2%}", "flip_rate"),
)


@dataclass(frozen=True)
class CardMetric:
    """A figure of the model and, where there is one, of its baseline; `metric` is empty for what isn't quality."""

    name: str
    metric: str
    value: float
    baseline: float | None
    form: str

    def cells(self) -> tuple[str, str, str]:
        """Return name, baseline and value as they stand in a table."""
        return (
            self.name,
            "–" if self.baseline is None else self.form.format(self.baseline),
            self.form.format(self.value),
        )


@dataclass(frozen=True)
class CardScore:
    """The model's score on a task of lm-eval, by the task's and the metric's names; `name` has the filter too."""

    task: str
    metric: str
    name: str
    value: float


@dataclass(frozen=True)
class CardMetrics:
    """All figures of an evaluation, on which text, and the conditions in words.

    `tables` are those of what was measured in several places, by title; `scores` those of tasks. `weights` digests what
    was measured, empty where that was not recorded.
    """

    rows: tuple[CardMetric, ...]
    text: str
    conditions: str
    tables: tuple[tuple[str, MetricTable], ...] = ()
    scores: tuple[CardScore, ...] = ()
    weights: str = ""

    def results(self, task: str) -> list[EvalResult]:
        """Return the quality figures and the scores of a model for `task` as the Hub's metadata knows them."""
        from huggingface_hub import EvalResult

        own = [
            EvalResult(
                task_type=task, dataset_type="text", dataset_name=self.text, metric_type=row.metric,
                metric_name=row.name, metric_value=float(f"{row.value:.6g}"),
            )
            for row in self.rows if row.metric
        ]  # fmt: skip
        return own + [
            EvalResult(
                task_type=task, dataset_type=score.task, dataset_name=score.task, metric_type=score.metric,
                metric_name=score.name, metric_value=float(f"{score.value:.6g}"),
            )
            for score in self.scores
        ]  # fmt: skip


def read_metrics(directory: Path) -> CardMetrics | None:
    """Return the figures in the folder's eval.json, or None where there are none.

    Raises:
        CheckpointError: it is not JSON.
    """
    path = directory / EVALUATION
    if not path.is_file():
        return None
    try:
        found = read_json(path)
    except CheckpointError as error:
        raise CheckpointError(error.message, "Run `uptrain eval` again, or remove it.") from None
    model, baseline = _mapping(found.get("model")), _mapping(found.get("baseline"))
    rows = [
        CardMetric(name, metric, value, number_in(baseline, key), form)
        for name, key, form, metric in _OF_EACH
        if (value := number_in(model, key)) is not None
    ]
    rows += [
        CardMetric(name, metric, value, None, form)
        for name, key, form, metric in _OF_BOTH
        if (value := number_in(found, key)) is not None
    ]
    if not rows:
        return None
    tables, scores = tuple(_tables(found)), tuple(_scores(found))
    return CardMetrics(tuple(rows), _text(found), _conditions(found), tables, scores, weights_of(found))


def _tables(found: Mapping[str, Any]) -> Iterator[tuple[str, MetricTable]]:
    """Yield a title and a table for what was measured in more than one place."""
    baseline = "original" if _mapping(found.get("baseline")) else None
    made = (
        ("By text and context", 2, by_text(found)),
        ("Tasks of lm-eval, with standard errors", 1, tasks(found, "this model", baseline)),
        ("Retrieval of a hidden pass key", 1, needle(found, "this model", baseline)),
        ("Tokens per second of all sequences, slowest to fastest", 2, speeds(found, "this", baseline)),
    )
    yield from ((title, table) for title, least, table in made if len(table.rows) >= least)


def _scores(found: Mapping[str, Any]) -> Iterator[CardScore]:
    for row in rows_of(found, "tasks"):
        value = number_in(row, "value")
        if value is not None and row.get("task") and row.get("metric"):
            yield CardScore(str(row["task"]), str(row["metric"]), task_metric_name(row), value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(found: Mapping[str, Any]) -> str:
    names = found.get("texts", found.get("text"))
    names = [names] if isinstance(names, str) else names
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        # A path on somebody's machine tells a reader nothing.
        return ", ".join(Path(name).name for name in names)
    return "held-out text"


def _conditions(found: Mapping[str, Any]) -> str:
    tokens = number_in(found, "tokens")
    words = [f"{tokens:,.0f} tokens" if tokens is not None else ""]
    for key in ("context", "stride"):
        size = number_in(found, key)
        words.append(f"{key} {size:,.0f}" if size is not None else "")
    if isinstance(found.get("dtype"), str):
        words.append(f"{found['dtype']} on {found.get('device', 'an unknown device')}")
    if speed := number_in(found, "speed_context"):
        words.append(f"speed of one sequence at {speed:,.0f} tokens")
    return ", ".join(filter(None, words))
