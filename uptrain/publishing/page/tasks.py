"""The page's section on tasks of lm-eval: each score with its interval, and that of the original."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uptrain.evaluation.tables import number_in, task_metric_name, tasks
from uptrain.publishing.page.models import PageModel, table_of
from uptrain.publishing.page.section import ORIGINAL, Chart, Section
from uptrain.publishing.page.style import INK, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NORMAL = 1.959964
"""Number of standard errors on either side of a mean in a 95 % interval."""


@dataclass(frozen=True)
class TaskScore:
    """A model's score on a task.

    - `task`, `metric`: the names of the task and of its metric.
    - `name`: the model's name.
    - `value`: the score, a share from 0 to 1.
    - `half`: half of its 95 % interval; 0 if no standard error is known.
    """

    task: str
    metric: str
    name: str
    value: float
    half: float


def task_section(models: list[PageModel]) -> Iterator[Section]:
    """Yield the section if tasks were run. Call it inside `style.drawing`."""
    ran = [model for model in models if model.rows("tasks")]
    if not ran:
        return
    table = table_of(ran, lambda found: tasks(found, "this", ORIGINAL))
    text = (
        "Tasks of lm-eval, all models on the same documents; ± is a standard error. The difference of two models is "
        "paired by document, so its error is smaller than the two errors suggest."
    )
    drawn = []
    scores = list(_scores(ran))
    if scores:
        text += " The chart has the metrics that are shares, with 95 % intervals."
        says = "Score of each model on each task, with 95 % intervals; the table has the values."
        drawn.append(Chart("tasks", task_chart(scores), says))
    yield Section("Tasks", text, drawn, table.columns, table.rows)


def _scores(models: Sequence[PageModel]) -> Iterator[TaskScore]:
    """Yield the scores that fit on one axis: those whose every value is a share, and where more is better."""
    listed: dict[tuple[str, str], list[TaskScore]] = {}
    for model in models:
        for row in model.rows("tasks"):
            key = (str(row.get("task", "")), task_metric_name(row))
            for name, of in ((ORIGINAL, "baseline_"), (model.name, "")):
                value, stderr = number_in(row, f"{of}value"), number_in(row, f"{of}stderr")
                if value is not None and row.get("higher_is_better") is not False:
                    score = TaskScore(*key, name, value, _NORMAL * (stderr or 0.0))
                    found = listed.setdefault(key, [])
                    if score not in found:
                        found.append(score)
    for found in listed.values():
        if all(0 <= score.value <= 1 for score in found):
            yield from found


def task_chart(scores: Sequence[TaskScore]) -> Figure:
    """Draw a dot with its interval for each score: a row per task and metric, a colour per model."""
    kinds = list(dict.fromkeys((score.task, score.metric) for score in scores))
    names = sorted(dict.fromkeys(score.name for score in scores), key=lambda name: name != ORIGINAL)
    step = min(0.32, 0.66 / len(names))
    found, axes = new_figure(0.95 + len(kinds) * (0.28 + 0.17 * len(names)))
    for number, name in enumerate(names):
        mine = [score for score in scores if score.name == name]
        heights = [kinds.index((score.task, score.metric)) + step * (number - (len(names) - 1) / 2) for score in mine]
        own = names[0] != ORIGINAL
        colour = INK if name == ORIGINAL else SERIES[(number - (not own)) % len(SERIES)]
        axes.errorbar([100 * score.value for score in mine], heights, xerr=[100 * score.half for score in mine],
                      fmt="o", color=colour, markersize=6, capsize=3, linewidth=1.3, label=name)  # fmt: skip
    axes.set_yticks(range(len(kinds)), [f"{task}\n{metric}" for task, metric in kinds])
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("score, %")
    found.legend(loc="outside upper center", ncols=3, fontsize=8.5)
    return found
