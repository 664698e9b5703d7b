"""The default baseline of `uptrain eval`: the model that the checkpoint was converted from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from uptrain.checkpoint.folder_digest import changed_file
from uptrain.checkpoint.loadable import open_loadable
from uptrain.checkpoint.manifest import converted_from
from uptrain.checkpoint.source import Source, resolve
from uptrain.errors import CheckpointError, UptrainError

_NAME_IT = "Name it with --baseline MODEL, or leave it out with --no-baseline."


def find_baseline(model: str, allow_pickle: bool = False) -> tuple[Source | None, str]:
    """Return the source that the folder `model` was converted from, if it is on this machine, and a note about it.

    Nothing is downloaded, and a source of pickles needs `allow_pickle`. The note is empty where the history of `model`
    names no source.

    Raises:
        CheckpointError: the uptrain.json of `model` is broken.
    """
    folder = Path(model).expanduser()
    recorded = converted_from(folder) if folder.is_dir() else None
    if recorded is None:
        return None, ""
    name = str(recorded.get("name"))
    try:
        source = replace(_here(name, recorded), allow_pickle=allow_pickle)
        open_loadable(source.path, allow_pickle)
    except (UptrainError, OSError, RuntimeError, ValueError) as error:
        reason = error.message if isinstance(error, UptrainError) else str(error)
        return None, f"Measured without a baseline: {model} was converted from {name}. {reason} {_NAME_IT}"
    if changed := changed_file(source.path, recorded):
        return None, (
            f"Measured without a baseline: {source.path / changed} is not what {model} was converted from. {_NAME_IT}"
        )
    return source, f"Comparing with {source.describe()}, which {model} was converted from; --no-baseline leaves it out."


def _here(name: str, recorded: Mapping[str, Any]) -> Source:
    """Return the recorded source, if it is on this machine.

    Raises:
        UptrainError: it is not.
    """
    if recorded.get("origin") == "demo":
        return resolve("demo")
    if recorded.get("origin") != "hub":
        if not Path(name).expanduser().is_dir():
            raise CheckpointError(f"There is no folder {name} here.")
        return resolve(name)
    from huggingface_hub import snapshot_download

    revision = recorded.get("revision")
    try:
        folder = snapshot_download(name, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        raise CheckpointError(f"{name} is not in the Hub cache.") from None
    return Source(Path(folder), name, "hub", revision)
