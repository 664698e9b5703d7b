"""Run tasks of lm-eval (EleutherAI's evaluation harness) on models that are loaded already."""

from __future__ import annotations

import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uptrain.checkpoint.events import Events
from uptrain.errors import UsageError, did_you_mean, needing, reported_as
from uptrain.evaluation.intervals import interval
from uptrain.evaluation.pair import ModelPair
from uptrain.evaluation.progress import counted
from uptrain.evaluation.settings import TaskSettings
from uptrain.models import devices

_RESAMPLES = 1000
"""Resamples of the bootstrap, for metrics whose standard error has no closed form."""
_FEWSHOT_SEED = 1234
_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class TaskMetric:
    """One metric of one task: of the model, and of the baseline on the same documents.

    `samples` counts documents. `stderr` is lm-eval's; None for metrics without one. `difference_interval` is the 95 %
    interval of value − baseline_value, paired by document; None where the metric is no mean over documents.
    """

    task: str
    metric: str
    filter: str
    higher_is_better: bool | None
    samples: int
    value: float
    stderr: float | None
    baseline_value: float | None = None
    baseline_stderr: float | None = None
    difference_interval: tuple[float, float] | None = None


def load_tasks(settings: TaskSettings) -> Any:
    """Return the tasks with their documents, as lm-eval's own dictionary.

    Raises:
        UsageError: lm-eval is not installed, doesn't know a task, or can't read its documents.
    """
    with _quietly():
        with needing("--task"):
            from lm_eval import tasks as harness
        if settings.include_path is not None and not Path(settings.include_path).is_dir():
            raise UsageError(f"There is no folder {settings.include_path}.", "Name one that holds task YAML files.")
        for name in settings.names:
            if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
                raise UsageError(f"There is no file {name}.", "Name a task of lm-eval, or a task's YAML file.")
        # Reading lm-eval's own thousands of files is slow, so that is done only for a name that is not found otherwise.
        for defaults in (False, True):
            manager = harness.TaskManager(include_path=settings.include_path, include_defaults=defaults)
            unknown = [name for name in settings.names if name not in manager.task_index and not Path(name).is_file()]
            if not unknown:
                break
        else:
            raise UsageError(
                f"lm-eval knows no task {unknown[0]}.",
                did_you_mean(unknown[0], manager.all_tasks) or "Name a task, or the path of a task's YAML file.",
            )
        # A task's file or data can fail in many ways, from wrong YAML to a server that doesn't answer.
        with reported_as(lambda reason: UsageError(f"lm-eval can't load {', '.join(settings.names)}: {reason}")):
            loaded = manager.load(list(dict.fromkeys(settings.names)))
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


class _AnswerCounter:
    """Counts the answers of all models. lm-eval takes it for a cache and reports every answer to it."""

    def __init__(self, tasks: Any, models: int, events: Events) -> None:
        self._tasks, self._models, self._events = tasks["tasks"].values(), models, events
        self._advance: Callable[[int], None] | None = None

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Count an answer; the name is lm-eval's."""
        if self._advance is None:
            # lm-eval makes all requests before the first answer.
            asked = sum(each.repeats for task in self._tasks for each in task.instances)
            self._advance = counted("Tasks", self._models * asked, self._events)
        self._advance(1)


@devices.enough_memory("Running tasks", "Compute in a smaller --dtype, or on --device cpu.")
def run_tasks(pair: ModelPair, tasks: Any, limit: int | None, events: Events) -> list[TaskMetric]:
    """Run tasks of lm-eval on each model and return every metric.

    - `pair`: the models.
    - `tasks`: what `load_tasks` returned.
    - `limit`: how many documents of each task to use; None for all.
    - `events`: `part` is called after each answer.

    Raises:
        UsageError: lm-eval refuses a task, such as one that runs code.
    """
    answers = _AnswerCounter(tasks, len(pair.models), events)
    with _quietly(bars=False):
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            found = []
            for model, tokenizer in zip(pair.models, pair.tokenizers, strict=True):
                asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH)
                asked.set_cache_hook(answers)
                found.append(evaluate(asked, tasks, limit=limit, bootstrap_iters=_RESAMPLES))
        except (ValueError, OverflowError) as error:
            raise UsageError(f"lm-eval can't run {', '.join(tasks['tasks'])}: {' '.join(str(error).split())}") from None
    return list(_task_metrics(found))


def _task_metrics(found: Sequence[Any]) -> Iterator[TaskMetric]:
    """Yield every metric of lm-eval's results, one result per model."""
    first = found[0]
    for name, metrics in _metrics(first).items():
        parts = first["group_subtasks"].get(name) or [name]
        samples = sum(first["n-samples"][part]["effective"] for part in parts if part in first["n-samples"])
        higher = first["higher_is_better"].get(name, {})
        for key in metrics:
            metric, _, chosen = key.partition(",")
            values = [_number(_metrics(each)[name].get(key)) for each in found]
            if not chosen or metric.endswith("_stderr") or values[0] is None:
                continue
            errors = [_number(_metrics(each)[name].get(f"{metric}_stderr,{chosen}")) for each in found]
            alone = TaskMetric(
                task=name, metric=metric, filter=chosen, higher_is_better=higher.get(metric), samples=samples,
                value=values[0], stderr=errors[0],
            )  # fmt: skip
            if len(found) == 1:
                yield alone
                continue
            ends = _difference_interval(found, name, metric, chosen)
            yield replace(alone, baseline_value=values[1], baseline_stderr=errors[1], difference_interval=ends)


def _metrics(found: Any) -> dict[str, Any]:
    return {**found["results"], **found.get("groups", {})}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _difference_interval(found: Sequence[Any], task: str, metric: str, chosen: str) -> tuple[float, float] | None:
    """Return the interval of the difference, paired by document; None for a metric that is no mean over documents."""
    by_document = []
    for each in found:
        rows = [row for row in each["samples"].get(task, []) if row["filter"] == chosen]
        values = [row.get(metric) for row in sorted(rows, key=lambda row: int(row["doc_id"]))]
        if not values or not all(isinstance(value, int | float) for value in values):
            return None
        mean = _metrics(each)[task][f"{metric},{chosen}"]
        if abs(sum(values) / len(values) - mean) > 1e-9 * max(1.0, abs(mean)):
            return None
        by_document.append(values)
    return interval([one - other for one, other in zip(*by_document, strict=True)], [1] * len(by_document[0]))


@contextmanager
def _quietly(bars: bool = True) -> Iterator[None]:
    """Hide what lm-eval prints, logs and warns about; `bars` lets progress bars through on a terminal."""
    log = logging.getLogger("lm_eval")
    level, before = log.level, os.environ.get("DISABLE_MULTIPROC")
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(io.StringIO()))
        if not (bars and sys.stderr.isatty()):
            stack.enter_context(redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        # Its bootstrap would fork a process that has run torch's threads.
        os.environ["DISABLE_MULTIPROC"] = "1"
        try:
            yield
        finally:
            log.setLevel(level)
            os.environ.pop("DISABLE_MULTIPROC")
            if before is not None:
                os.environ["DISABLE_MULTIPROC"] = before
