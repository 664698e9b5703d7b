"""Read a JSON file that must hold one object, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from uptrain.errors import CheckpointError

JSON_LIMIT = 64 * 2**20
"""Bytes. The index of a trillion parameters has a quarter of them; a larger file is damaged or an attack on memory."""


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict from JSON pairs, and refuse a repeated key.

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
        CheckpointError: the text is not JSON in UTF-8, not an object or nested too deep, or has a repeated key or half
            a character.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=no_duplicates)
        if "\\ud" in text.lower():  # half of a character that takes two escapes can be read, but never written
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = str(error) or "it is nested too deep"
        raise CheckpointError(f"{what} is not valid JSON: {reason}.", "Download it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a JSON {type(value).__name__}, not an object.")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read `path` as one JSON object.

    Raises:
        CheckpointError: the file is missing, can't be read, is too large, or is not one JSON object.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file.")
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{path} is larger than {JSON_LIMIT >> 20} MiB, which no real one is.")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.") from None
    return parse_object(data, str(path))


def dump_json(value: Any, allow_nan: bool = False) -> str:
    """Return `value` as indented JSON text ending in a newline.

    With `allow_nan`, infinity and NaN are written as Python and transformers write them; strict JSON has neither.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n"
