"""Read a JSON file that must hold one object, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from uptrain.errors import CheckpointError

JSON_LIMIT = 200 * 2**20
"""Bytes. No real config or index comes near it; a larger one is damage or an attack on memory."""


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict from JSON pairs, refusing a key that stands twice.

    Raises:
        ValueError: a key is repeated, so two readers could see two different files.
    """
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {key!r} stands twice")
        out[key] = value
    return out


def parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """Parse one JSON object; `what` names it in errors.

    Raises:
        CheckpointError: not JSON, not an object, nested too deep, or a key repeated.
    """
    try:
        value = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        reason = str(error) or "it is nested too deep"
        raise CheckpointError(f"{what} is not valid JSON: {reason}.", "Download it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a JSON {type(value).__name__}, not an object.")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read `path` as one JSON object.

    Raises:
        CheckpointError: missing, unreadable, too large or not one JSON object.
    """
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{path} is larger than {JSON_LIMIT >> 20} MiB, which no real one is.")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.") from None
    return parse_object(data, str(path))


def dump_json(value: Any) -> str:
    """Return `value` as indented JSON text ending in a newline."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
