"""Refuse GGUF files where a safetensors checkpoint is expected."""

from __future__ import annotations

from pathlib import Path

from uptrain.errors import CheckpointError


def refuse_gguf(path: Path) -> None:
    """Refuse a GGUF file, or a folder in which all weights are such files.

    Raises:
        CheckpointError: `path` is such a file or folder.
    """
    found = sorted(path.glob("*.gguf")) if path.is_dir() else [path] if path.suffix == ".gguf" else []
    if found:
        raise CheckpointError(
            f"{found[0]} is a GGUF file, whose weights are quantized or ordered for llama.cpp; uptrain reads "
            "safetensors.",
            "Convert the original in full precision, and make a GGUF file of the result.",
        )
