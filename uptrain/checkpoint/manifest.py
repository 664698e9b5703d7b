"""uptrain.json: where a checkpoint came from, what was done to it, and the digest of every file."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from uptrain.checkpoint.adapters import ADAPTER_CONFIG
from uptrain.checkpoint.checksum import DEFAULT, algorithm_of, checksum_file
from uptrain.checkpoint.files import write_atomic
from uptrain.checkpoint.jsonfile import dump_json, read_json
from uptrain.checkpoint.locks import LOCK, WORK_LOCKS
from uptrain.checkpoint.output_folder import STATE
from uptrain.errors import CheckpointError, VerificationError

MANIFEST = "uptrain.json"
SIGNATURE = MANIFEST + ".sig"
EVALUATION = "eval.json"
"""Measurements of a folder's weights. They are not valid for other weights, so they are never copied."""
FORMAT = 1
_RECORDED = ("uptrain", "numpy", "safetensors", "torch", "transformers", "accelerate", "tokenizers")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages on which a result can depend."""
    from importlib import metadata  # slow to import, and only needed at the end

    out = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of `directory`, or None where it has none.

    Raises:
        CheckpointError: the file is not a manifest of a known format.
    """
    if not (directory / MANIFEST).is_file():
        return None
    manifest = read_json(directory / MANIFEST)
    stages, files = manifest.get("stages"), manifest.get("files")
    listed = isinstance(stages, list) and all(isinstance(stage, dict) for stage in stages)
    try:
        dump_json(manifest)  # it will be written again, and Python reads numbers that JSON can't hold
    except ValueError:
        listed = False
    if manifest.get("format") != FORMAT or not listed or not isinstance(files, dict):
        raise CheckpointError(f"{directory / MANIFEST} is not an uptrain manifest of format {FORMAT}.")
    return manifest


def converted_from(directory: Path) -> dict[str, Any] | None:
    """Return the source of a checkpoint's first conversion (its name, origin and revision), or None without one.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    stages = (read_manifest(directory) or {"stages": []})["stages"]
    sources = (stage.get("source") for stage in stages if stage.get("stage") == "convert")
    return next((source for source in sources if isinstance(source, dict)), None)


def append_stage(
    directory: Path, base: Path | None, stage: dict[str, Any], known: dict[str, str] | None = None
) -> None:
    """Write the manifest of a folder: the history of its base, a new stage, and every file's digest.

    - `directory`: the folder.
    - `base`: the checkpoint whose history goes before, None for none.
    - `stage`: what was done to it now.
    - `known`: digests by file name that were computed while writing; the other files are read.
    """
    earlier = read_manifest(base) if base is not None else None
    stages = [*(earlier["stages"] if earlier else []), {**stage, "versions": versions()}]
    manifest = {"format": FORMAT, "stages": stages, "files": file_digests(directory, known or {})}
    write_atomic(directory / MANIFEST, dump_json(manifest))


def file_digests(directory: Path, known: dict[str, str], algorithm: str = DEFAULT) -> dict[str, dict[str, Any]]:
    """Return size in bytes and checksum of every file of `directory` except the manifest and its signature."""
    return {
        name: {"size": path.stat().st_size, "checksum": known.get(name) or checksum_file(path, algorithm)}
        for name, path in _files(directory)
    }


def _files(directory: Path) -> list[tuple[str, Path]]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    named = [(path.relative_to(directory).as_posix(), path) for path in paths]
    ours = (MANIFEST, SIGNATURE, STATE, LOCK, WORK_LOCKS)
    return [(name, path) for name, path in named if name.partition("/")[0] not in ours]


def verify(directory: Path) -> dict[str, Any]:
    """Re-check every file of `directory` against its manifest and return the manifest.

    Raises:
        CheckpointError: no folder or no manifest.
        VerificationError: a file is missing, or its size or bytes changed, or there is an unlisted file that would be
            loaded.
    """
    if not directory.is_dir():
        raise CheckpointError(f"There is no folder {directory}.")
    manifest = read_manifest(directory)
    if manifest is None:
        raise CheckpointError(
            f"{directory} has no {MANIFEST}, so there is nothing to verify it against.",
            "Only folders that uptrain wrote have one.",
        )
    for name, entry in manifest["files"].items():
        _verify_file(directory, str(name), entry)
    for name in unlisted(directory, manifest):
        # An adapter's config would be loaded on top of the weights.
        if name.endswith((".safetensors", ".bin", ".py")) or name == ADAPTER_CONFIG:
            raise VerificationError(f"{directory / name} is not listed in {MANIFEST}: it was added later.")
    return manifest


def unlisted(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """Return the files of `directory` that its manifest does not list, without the manifest and its signature."""
    return [name for name, _ in _files(directory) if name not in manifest["files"]]


def _verify_file(directory: Path, name: str, entry: Any) -> None:
    path = directory / name
    try:
        inside, there = directory.resolve() in path.resolve().parents, path.is_file()
    except (OSError, RuntimeError, ValueError):  # too long, a link to itself, or a NUL
        inside = there = False
    if not inside:
        raise VerificationError(f"{directory / MANIFEST} names {name!r}, which is outside its folder.")
    if not isinstance(entry, dict) or not algorithm_of(str(entry.get("checksum"))):
        raise VerificationError(f"{directory / MANIFEST} has no usable checksum for {name}.")
    if not there:
        raise VerificationError(f"{path} is missing.", "Convert or download it again.")
    size = path.stat().st_size
    if size != entry.get("size"):
        raise VerificationError(
            f"{path} is {size:,} bytes where {MANIFEST} says {entry.get('size')}.", "Convert or download it again."
        )
    if checksum_file(path, algorithm_of(entry["checksum"])) != entry["checksum"]:
        raise VerificationError(
            f"{path} does not match its checksum in {MANIFEST}: its bytes changed since it was written.",
            "Convert or download it again.",
        )
