"""What must be true of a folder before it goes to the Hub; each refusal is one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from uptrain.checkpoint.header import ITEM_BITS
from uptrain.checkpoint.manifest import MANIFEST, verify
from uptrain.checkpoint.reader import INDEX, Checkpoint, open_checkpoint
from uptrain.errors import CheckpointError, VerificationError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tiktoken.model")
_UNSAFE = frozenset((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack"))

# A value is NaN or infinite when all bits under the mask are set: the exponent's, or in formats that have no
# infinity, those of the one pattern that stands for NaN. Reading bits is exact and many times faster than isfinite,
# which ml_dtypes computes value by value.
_NOT_FINITE = MappingProxyType(
    {
        "F64": 0x7FF0_0000_0000_0000, "C64": 0x7F80_0000, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80,
        "F8_E5M2": 0x7C, "F8_E4M3": 0x7F, "F8_E8M0": 0xFF,
    }
)  # fmt: skip


def check_folder(
    directory: Path, on_bytes: Callable[[int], None] = lambda count: None
) -> tuple[Checkpoint, dict[str, Any]]:
    """Check that `directory` is whole, safe to load and free of NaN; return its checkpoint and its manifest.

    `on_bytes` gets the bytes of weights looked at, as they are.

    Raises:
        VerificationError: a file is missing, changed, or not in the manifest.
        CheckpointError: no folder or manifest, weights that are not safetensors, NaN or infinity, no tokenizer.
    """
    _refuse_unsafe(directory)
    manifest = verify(directory)
    checkpoint = open_checkpoint(directory)
    needed = ["config.json", *checkpoint.files, *([INDEX] if (directory / INDEX).exists() else [])]
    for name in needed:
        if name not in manifest["files"]:
            raise VerificationError(f"{directory / name} is not listed in {MANIFEST}: it was added later.")
    if not any((directory / name).is_file() and name in manifest["files"] for name in _TOKENIZERS):
        raise CheckpointError(
            f"{directory} has no tokenizer, so nobody could use it.",
            "Put the source's tokenizer files into the source's folder and convert again.",
        )
    for name in checkpoint.tensors:
        check_finite(checkpoint, name, on_bytes)
    return checkpoint, manifest


def _refuse_unsafe(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        if path.suffix in _UNSAFE:
            raise CheckpointError(
                f"{path} is not safetensors, and loading such a file can run code.",
                "Remove it, or convert the checkpoint to safetensors.",
            )


def check_finite(checkpoint: Checkpoint, name: str, on_bytes: Callable[[int], None] = lambda count: None) -> None:
    """Refuse tensor `name` if it holds NaN or infinity, reading a few MiB at a time.

    Raises:
        CheckpointError: it does, or can't be read.
    """
    info = checkpoint.tensors[name]
    mask = _NOT_FINITE.get(info.dtype)
    width = 4 if info.dtype == "C64" else max(1, ITEM_BITS[info.dtype] // 8)
    rest = b""
    for chunk in checkpoint.chunks(name):
        # Some file systems read less than they were asked for, and may cut a value in two.
        whole = rest + chunk if rest else chunk
        end = len(whole) // width * width
        rest = bytes(whole[end:])
        if mask is not None and _has(np.frombuffer(whole[:end], f"<u{width}"), mask):
            raise CheckpointError(
                f"{checkpoint.path / info.file} has NaN or infinity in tensor {name}.",
                "Convert or train again: a model with such a value generates nonsense.",
            )
        on_bytes(len(chunk))


def _has(bits: npt.NDArray[Any], mask: int) -> bool:
    return bool((bits & bits.dtype.type(mask)).max(initial=0) == mask)
