"""Digests of a folder's weights and config: they show whether a measurement or a teacher has the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uptrain.checkpoint.checksum import DEFAULT, Checksum, algorithm_of, checksum_file
from uptrain.checkpoint.jsonfile import dump_json, read_json
from uptrain.checkpoint.weight_files import files_of, find_weights, names_in, read_weight_map
from uptrain.errors import CheckpointError

_CONFIG = "config.json"
_PICKLES = (".bin", ".pt", ".pth")


def _weights_and_config(folder: Path) -> list[str]:
    """Return the names of the config and of the files with the folder's weights, pickles too."""
    try:
        config = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
        weights = find_weights(names_in(folder, config), config, folder, allow_pickle=True)
        files = files_of(weights, read_weight_map(folder, weights))
    except CheckpointError:  # transformers may read files that uptrain refuses
        files = [path.name for path in folder.iterdir() if path.suffix in (".safetensors", *_PICKLES)]
    return sorted({*files, *([_CONFIG] if (folder / _CONFIG).is_file() else [])})


def weights_digest(folder: Path, known: Mapping[str, Any] | None = None) -> str:
    """Digest the weights and the config of `folder`.

    `known` is the `files` of a manifest whose checksums are trusted; other files are read.
    """
    sums = {}
    for name in _weights_and_config(folder):
        entry = (known or {}).get(name)
        found = str(entry.get("checksum")) if isinstance(entry, Mapping) else ""
        sums[name] = found if algorithm_of(found) == DEFAULT else checksum_file(folder / name)
    digest = Checksum()
    digest.update(dump_json(sums).encode())
    return digest.text()


def changed_file(folder: Path, recorded: Mapping[str, Any]) -> str:
    """Return the first file of the folder's weights and config that differs from a manifest's record of a source.

    `recorded` is what `converted_from` returns. The result is empty if no file differs or the record has no checksums.
    """
    files = recorded.get("files")
    for name in _weights_and_config(folder):
        if not isinstance(files, Mapping):
            continue
        known = str(files.get(name))
        if not algorithm_of(known) or checksum_file(folder / name, algorithm_of(known)) != known:
            return name
    return ""
