"""The help of --method and --grouping, written from the registry of methods."""

from __future__ import annotations

from uptrain.methods.method import Method
from uptrain.methods.registry import GROUPINGS, METHODS, TARGETS, default_method, methods_with


def method_help() -> str:
    """Return the help of `--method`: every method with its summary, what it needs, and when it is the default."""
    return f"How heads become one. {' '.join(f'{name}: {_described(entry)}.' for name, entry in METHODS.items())}"


def grouping_help() -> str:
    """Return the help of `--grouping`: every grouping with its summary."""
    known = " or ".join(f"{grouping.name} ({grouping.summary})" for grouping in GROUPINGS.values())
    return f"Which heads share one: {known}."


def seed_help() -> str:
    """Return the help of `--seed`: what draws random numbers."""
    groupings = [f"--grouping {grouping.name}" for grouping in GROUPINGS.values() if grouping.seeded]
    return f"For --method {' or '.join(methods_with('seed'))} and {' or '.join(groupings)}. Default: 0."


def _described(method: Method) -> str:
    needs = [what for what, needed in (("torch", method.needs_torch), ("text", method.needs_text)) if needed]
    words = method.summary + (f"; needs {' and '.join(needs)}" if needs else "")
    defaults = [f"--to {name}" for name, target in TARGETS.items() if default_method(target) == method.name]
    words += f"; the default of {' and '.join(defaults)}" if defaults else ""
    return words + ("; the default with --calibrate" if method.needs_text else "")
