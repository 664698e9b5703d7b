"""What long work reports while it runs, as one object that every call passes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _ignore(*_: Any) -> None:
    """Do nothing: the default of every event."""


@dataclass(frozen=True, kw_only=True)
class Events:
    """Callables that long work calls while it runs. Each does nothing by default.

    - `bytes`: called with the number of bytes that were just finished.
    - `layer`: called with the number of finished layers and the number of all layers.
    - `part`: called with the name of a part of the work, how much of it is done and its total.
    - `step`: called with the metrics of one training step.
    - `note`: called with a sentence for the user.
    """

    bytes: Callable[[int], None] = _ignore
    layer: Callable[[int, int], None] = _ignore
    part: Callable[[str, int, int], None] = _ignore
    step: Callable[[Any], None] = _ignore
    note: Callable[[str], None] = _ignore
