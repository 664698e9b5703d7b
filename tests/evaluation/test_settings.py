"""Settings and results are built by keyword alone, cost no torch, and refuse what belongs to no local folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpus import checkpoint, corpus
from uptrain.data.sources import Files
from uptrain.errors import UsageError
from uptrain.evaluation import Evaluation, EvaluationSettings, evaluate
from uptrain.evaluation.needle import NeedleCell
from uptrain.evaluation.quality_row import QualityRow, WindowSums
from uptrain.evaluation.result import EvaluationRun, ModelMetrics
from uptrain.evaluation.samples import Sample
from uptrain.evaluation.settings import NeedleSettings, TaskSettings
from uptrain.evaluation.speed import SpeedCell, SpeedPlan
from uptrain.evaluation.sweep_results import RefusedTrial, Sweep, Trial
from uptrain.evaluation.tasks import TaskMetric
from uptrain.workflows import SweepSettings

LIGHT = """
import sys
from uptrain.evaluation import EvaluationSettings
from uptrain.evaluation.settings import NeedleSettings, TaskSettings
EvaluationSettings(needle=NeedleSettings(), tasks=TaskSettings(names=("piqa",)))
import uptrain.evaluation.sweep_results, uptrain.evaluation.tables, uptrain.workflows
print("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    "made",
    [Evaluation, EvaluationRun, EvaluationSettings, ModelMetrics, NeedleCell, NeedleSettings, QualityRow, RefusedTrial,
     Sample, SpeedCell, SpeedPlan, Sweep, SweepSettings, TaskMetric, TaskSettings, Trial, WindowSums],
)  # fmt: skip
def test_no_value_is_given_by_its_position(made: type) -> None:
    with pytest.raises(TypeError, match="positional"):
        made(1)


def test_reading_settings_and_results_does_not_import_torch() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("asked", "contexts"), [(None, ()), (16, (16,)), ([32, 16, 32], (32, 16))], ids=["none", "one", "several"]
)
def test_one_context_is_a_list_of_one(asked: int | list[int] | None, contexts: tuple[int, ...]) -> None:
    settings = EvaluationSettings(context=asked, speed_context=asked)
    assert settings.contexts == settings.speed_contexts == contexts


@pytest.mark.parametrize(("asked", "batches"), [(1, (1,)), (8, (1, 8)), ([8, 2, 8], (1, 2, 8))])
def test_one_sequence_is_always_timed(asked: int | list[int], batches: tuple[int, ...]) -> None:
    assert EvaluationSettings(speed_batch=asked).speed_batches == batches


def test_a_revision_is_that_of_the_model_on_the_hub(tmp_path: Path) -> None:
    folder = str(checkpoint(tmp_path / "model"))
    settings = EvaluationSettings(text=[Files(files=str(corpus(tmp_path / "text.txt")))], context=16, repeats=0)
    with pytest.raises(UsageError, match="--revision main"):
        evaluate(folder, settings, revision="main")
    with pytest.raises(UsageError, match="--revision main is for a Hub id"):
        evaluate("demo", settings, baseline=folder, revision="main")
