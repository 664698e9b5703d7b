"""Refuse what a family can't become, in a sentence that says why and one that says what can be done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uptrain.errors import UsageError
from uptrain.layout import Architecture
from uptrain.model_config import holds_groups, why_fixed_order, why_pool_only
from uptrain.request import CHANGED_PARTS, Request


def check_method(architecture: Architecture, config: Mapping[str, Any], request: Request, name: str) -> None:
    """Refuse a method or grouping that isn't exact for this family.

    Raises:
        UsageError: it isn't.
    """
    if request.target == "mla" and not architecture.hosts.get("mla"):
        return  # that no class holds it is what to say
    why = why_pool_only(architecture, config)
    if why and "q" in CHANGED_PARTS[request.method]:
        raise UsageError(
            f"--method {request.method} can't be used on {name}: {why}.", "Use --method mean and uptrain the result."
        )
    if architecture.uncalibrated and request.method == "calibrated":
        raise UsageError(
            f"--method calibrated can't be used on {name}: {architecture.uncalibrated}.", "Use --method svd."
        )
    why = why_fixed_order(architecture, config)
    if why and request.grouping != "contiguous":
        raise UsageError(f"--grouping {request.grouping} can't be used on {name}: {why}.", "Leave --grouping out.")


def check_groups(
    architecture: Architecture, host: Architecture, config: Mapping[str, Any], groups: int, name: str
) -> None:
    """Refuse a number of key/value heads that the host's class can't have.

    Raises:
        UsageError: it can't.
    """
    if not holds_groups(host, config, groups):
        raise UsageError(
            f"{name} can't keep {groups} key/value heads: without {host.keys.grouped} "
            f"{architecture.model_type} has one or all.",
            "Use --to mqa.",
        )
