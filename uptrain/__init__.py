"""uptrain: make a trained language model cheaper to serve without making it dumber."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from uptrain.models.register import register_with_transformers

__version__ = "0.1.0"

if TYPE_CHECKING:
    from uptrain.checkpoint.events import Events as Events
    from uptrain.checkpoint.manifest import verify as verify
    from uptrain.conversion.inspection import inspect as inspect
    from uptrain.conversion.request import Request as Request
    from uptrain.conversion.run.convert import convert as convert
    from uptrain.conversion.run.options import RunOptions as RunOptions
    from uptrain.errors import UptrainError as UptrainError
    from uptrain.evaluation.run import evaluate as evaluate
    from uptrain.evaluation.settings import EvaluationSettings as EvaluationSettings
    from uptrain.models.loading import load as load
    from uptrain.publishing.hub.push import push as push
    from uptrain.training.run import train as train
    from uptrain.workflows.healing.run import convert_and_heal as convert_and_heal
    from uptrain.workflows.healing.settings import HealSettings as HealSettings
    from uptrain.workflows.sweeps.run import sweep as sweep
    from uptrain.workflows.sweeps.settings import SweepSettings as SweepSettings

_PUBLIC = {
    "EvaluationSettings": "uptrain.evaluation.settings",
    "Events": "uptrain.checkpoint.events",
    "HealSettings": "uptrain.workflows.healing.settings",
    "Request": "uptrain.conversion.request",
    "RunOptions": "uptrain.conversion.run.options",
    "SweepSettings": "uptrain.workflows.sweeps.settings",
    "UptrainError": "uptrain.errors",
    "convert": "uptrain.conversion.run.convert",
    "convert_and_heal": "uptrain.workflows.healing.run",
    "evaluate": "uptrain.evaluation.run",
    "inspect": "uptrain.conversion.inspection",
    "load": "uptrain.models.loading",
    "push": "uptrain.publishing.hub.push",
    "sweep": "uptrain.workflows.sweeps.run",
    "train": "uptrain.training.run",
    "verify": "uptrain.checkpoint.manifest",
}

__all__ = [
    "EvaluationSettings",
    "Events",
    "HealSettings",
    "Request",
    "RunOptions",
    "SweepSettings",
    "UptrainError",
    "convert",
    "convert_and_heal",
    "evaluate",
    "inspect",
    "load",
    "push",
    "sweep",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `import uptrain` costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'uptrain' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


register_with_transformers()
