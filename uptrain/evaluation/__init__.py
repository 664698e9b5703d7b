"""Measure models: quality, speed, tasks, retrieval and samples, alone or against a baseline."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uptrain.evaluation.result import Evaluation as Evaluation
    from uptrain.evaluation.run import evaluate as evaluate
    from uptrain.evaluation.settings import EvaluationSettings as EvaluationSettings

_PUBLIC = {
    "Evaluation": "uptrain.evaluation.result",
    "EvaluationSettings": "uptrain.evaluation.settings",
    "evaluate": "uptrain.evaluation.run",
}

__all__ = ["Evaluation", "EvaluationSettings", "evaluate"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that importing this package costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
