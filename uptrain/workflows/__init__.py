"""Work of several steps: a sweep over targets and methods, healing, and the demo."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uptrain.workflows.demo.run import run_demo as run_demo
    from uptrain.workflows.healing.run import convert_and_heal as convert_and_heal
    from uptrain.workflows.healing.settings import HealSettings as HealSettings
    from uptrain.workflows.sweeps.run import sweep as sweep
    from uptrain.workflows.sweeps.settings import SweepSettings as SweepSettings

_PUBLIC = {
    "HealSettings": "uptrain.workflows.healing.settings",
    "SweepSettings": "uptrain.workflows.sweeps.settings",
    "convert_and_heal": "uptrain.workflows.healing.run",
    "run_demo": "uptrain.workflows.demo.run",
    "sweep": "uptrain.workflows.sweeps.run",
}

__all__ = ["HealSettings", "SweepSettings", "convert_and_heal", "run_demo", "sweep"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that importing this package costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
