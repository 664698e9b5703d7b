"""Check a folder before it is uploaded to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from uptrain.checkpoint.manifest import MANIFEST, verify
from uptrain.checkpoint.nonfinite import finite
from uptrain.checkpoint.reader import Checkpoint, open_checkpoint
from uptrain.checkpoint.weight_files import INDEX
from uptrain.errors import CheckpointError, VerificationError
from uptrain.publishing.hub.tokenizer import check_tokenizer

_UNSAFE = frozenset((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack"))


def check_folder(
    directory: Path,
    on_bytes: Callable[[int], None] = lambda count: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> tuple[Checkpoint, dict[str, Any]]:
    """Check that `directory` is complete, safe to load and free of NaN. Returns its checkpoint and its manifest.

    - `directory`: a checkpoint that uptrain wrote.
    - `on_bytes`: called with the number of bytes of weights that were just checked.
    - `on_note`: called with a sentence on what can't be checked here.

    Raises:
        VerificationError: a file is missing, changed, or not in the manifest.
        CheckpointError: no folder or manifest, weights that are not safetensors, NaN or infinity, or no
            tokenizer that loads.
    """
    _refuse_unsafe(directory)
    manifest = verify(directory)
    checkpoint = open_checkpoint(directory)
    needed = ["config.json", *checkpoint.files, *([INDEX] if (directory / INDEX).exists() else [])]
    for name in needed:
        if name not in manifest["files"]:
            raise VerificationError(f"{directory / name} is not listed in {MANIFEST}, so it was added later.")
    check_tokenizer(directory, manifest["files"], on_note)
    for name in checkpoint.tensors:
        for chunk in finite(checkpoint, name, "Convert or train again: with such a value a model generates nonsense."):
            on_bytes(len(chunk))
    return checkpoint, manifest


def _refuse_unsafe(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        if path.suffix in _UNSAFE:
            raise CheckpointError(
                f"{path} is not a safetensors file, and loading such a file can run code.",
                "Remove it, or convert the checkpoint to safetensors.",
            )
