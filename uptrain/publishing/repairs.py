"""What a conversion changed outside attention, in a sentence for the model card and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def repaired(stage: Mapping[str, Any]) -> str:
    """Return a sentence on the norms and MLPs that a stage of uptrain.json changed, empty where it changed none."""
    layers = stage.get("calibration", {}).get("layers", ())
    changed = sum(bool(layer.get("changed")) for layer in layers)
    if not changed:
        return ""
    return f"In {changed} of {len(layers)} layers, norms and MLP differ from the source's too: they were repaired."
