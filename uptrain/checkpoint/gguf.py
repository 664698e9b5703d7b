"""Name GGUF files where a safetensors checkpoint is looked for."""

from __future__ import annotations

from pathlib import Path

from uptrain.errors import CheckpointError


def refuse_gguf(path: Path) -> None:
    """Refuse a GGUF file, or a folder in which such files are all the weights there are.

    Raises:
        CheckpointError: `path` is one.
    """
    found = sorted(path.glob("*.gguf")) if path.is_dir() else [path] if path.suffix == ".gguf" else []
    if found:
        raise CheckpointError(
            f"{found[0]} is a GGUF file, whose weights are quantized or laid out for llama.cpp; uptrain reads "
            "safetensors.",
            "Convert the original in full precision, and make a GGUF file of the result.",
        )
