"""Read the metrics of eval.json for a card. A metric that is missing or has another shape is left out."""

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

# Per metric: its name, its key in eval.json, its format, and its name in the Hub's metadata (empty for none).
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
    """A metric of the model and of its baseline, if there is one.

    - `name`: its name in the card's table.
    - `metric`: its name in the Hub's metadata; empty for one that is not about quality.
    - `value`, `baseline`: the values of the model and of the baseline.
    - `form`: the format of both.
    """

    name: str
    metric: str
    value: float
    baseline: float | None
    form: str

    def cells(self) -> tuple[str, str, str]:
        """Return name, baseline and value as cells of a table."""
        return (
            self.name,
            "–" if self.baseline is None else self.form.format(self.baseline),
            self.form.format(self.value),
        )


@dataclass(frozen=True)
class CardScore:
    """The model's score on a task of lm-eval. `name` is the name of the metric with its filter."""

    task: str
    metric: str
    name: str
    value: float


@dataclass(frozen=True)
class CardMetrics:
    """All metrics of an evaluation.

    - `rows`: the metrics of the first table.
    - `text`: the names of the texts.
    - `conditions`: number of tokens, context, dtype and so on, as one phrase.
    - `tables`: further tables, each after its title.
    - `scores`: scores on tasks.
    - `weights`: digest of the weights that were measured; empty if it was not recorded.
    """

    rows: tuple[CardMetric, ...]
    text: str
    conditions: str
    tables: tuple[tuple[str, MetricTable], ...] = ()
    scores: tuple[CardScore, ...] = ()
    weights: str = ""

    def results(self, task: str) -> list[EvalResult]:
        """Return metrics of quality and scores in the form of the Hub's metadata, for a model of type `task`."""
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
    """Return the metrics of the folder's eval.json, or None if there are none.

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
    """Yield a title and a table for each measurement of several rows."""
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
        # A path of another machine is of no use to a reader.
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
