"""Run tasks of lm-eval (EleutherAI's evaluation harness) on models that are loaded already."""

from __future__ import annotations

import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uptrain.errors import UsageError, did_you_mean
from uptrain.measure.intervals import interval

_RESAMPLES = 1000
"""Of the bootstrap, where a metric's standard error has no closed form."""
_FEWSHOT_SEED = 1234
_BATCH = 8


@dataclass(frozen=True)
class Tasks:
    """Which tasks to run: names that lm-eval knows, or paths of task YAML files.

    `include_path` is a folder of more task files; `limit` takes only so many documents of each task.
    """

    names: tuple[str, ...]
    include_path: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task: of the model, and of the baseline on the same documents.

    `samples` counts documents; `stderr` is lm-eval's, None for metrics that it knows none for. `difference_interval`
    is the 95 % interval of value − baseline_value, paired by document, where the metric is a mean over documents.
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


def load_tasks(wanted: Tasks) -> Any:
    """Return the tasks with their documents, as lm-eval's own dictionary.

    Raises:
        UsageError: lm-eval is not installed or knows no such task, or its documents can't be read.
    """
    with _quietly():
        try:
            from lm_eval import tasks as harness
        except ImportError:
            raise UsageError(
                "Tasks are run by lm-eval, which is not installed.", "pip install 'uptrain[eval]'"
            ) from None
        if wanted.include_path is not None and not Path(wanted.include_path).is_dir():
            raise UsageError(f"There is no folder {wanted.include_path}.", "Name one that holds task YAML files.")
        for name in wanted.names:
            if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
                raise UsageError(f"There is no file {name}.", "Name a task of lm-eval, or a task's YAML file.")
        # The harness' own thousands of files are read only for a name that nothing else explains.
        for defaults in (False, True):
            manager = harness.TaskManager(include_path=wanted.include_path, include_defaults=defaults)
            unknown = [name for name in wanted.names if name not in manager.task_index and not Path(name).is_file()]
            if not unknown:
                break
        else:
            raise UsageError(
                f"lm-eval knows no task {unknown[0]}.",
                did_you_mean(unknown[0], manager.all_tasks) or "Name a task, or the path of a task's YAML file.",
            )
        try:
            loaded = manager.load(list(dict.fromkeys(wanted.names)))
        except Exception as error:
            # Whatever a task's file or data does wrong, from YAML to a server that can't be reached.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"lm-eval can't load {', '.join(wanted.names)}: {reason}") from None
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def run_tasks(loaded: Sequence[Any], tokenizers: Sequence[Any], tasks: Any, limit: int | None) -> list[TaskFigure]:
    """Run tasks from `load_tasks` on one or two models and return every metric, the first model's as `value`.

    Raises:
        UsageError: lm-eval refuses a task, such as one that runs code.
    """
    with _quietly():
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            found = [
                evaluate(
                    HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH), tasks, limit=limit,
                    bootstrap_iters=_RESAMPLES,
                )
                for model, tokenizer in zip(loaded, tokenizers, strict=True)
            ]  # fmt: skip
        except (ValueError, OverflowError) as error:
            raise UsageError(f"lm-eval can't run {', '.join(tasks['tasks'])}: {' '.join(str(error).split())}") from None
    return list(_figures(found))


def _figures(found: Sequence[Any]) -> Iterator[TaskFigure]:
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
            alone = TaskFigure(name, metric, chosen, higher.get(metric), samples, values[0], errors[0])
            if len(found) == 1:
                yield alone
                continue
            apart = _apart(found, name, metric, chosen)
            yield replace(alone, baseline_value=values[1], baseline_stderr=errors[1], difference_interval=apart)


def _metrics(found: Any) -> dict[str, Any]:
    return {**found["results"], **found.get("groups", {})}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _apart(found: Sequence[Any], task: str, metric: str, chosen: str) -> tuple[float, float] | None:
    """Return the paired interval of a metric that is a mean over documents, else None."""
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
def _quietly() -> Iterator[None]:
    """Keep what lm-eval prints, logs and warns of off stdout, and off a stderr that is no terminal."""
    log = logging.getLogger("lm_eval")
    level, before = log.level, os.environ.get("DISABLE_MULTIPROC")
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(io.StringIO()))
        if not sys.stderr.isatty():
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
