"""Download of a Hub repository what is read, and nothing else: its weights once, and what goes along with them."""

from __future__ import annotations

import glob
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from uptrain.checkpoint.jsonfile import read_json
from uptrain.checkpoint.manifest import MANIFEST
from uptrain.checkpoint.sidecars import CONFIG, MODULES, short, sidecars_of
from uptrain.checkpoint.weight_files import PICKLE_INDEX, PICKLE_SINGLE, SINGLE, files_of, find_weights, read_weight_map
from uptrain.errors import CheckpointError

_LOOKED_AT = (MANIFEST, MODULES, "adapter_config.json")
"""What says where a model comes from and of which kind it is, beside its configs."""


@dataclass(frozen=True)
class Snapshot:
    """What of a repository lies in the Hub's cache: its folder, and the names of all files of the repository.

    Those are None where neither the Hub nor the cache has a list of them.
    """

    folder: Path
    listed: tuple[str, ...] | None


def download(model: str, revision: str | None, allow_pickle: bool, weights: bool) -> Snapshot:
    """Download what converting `model` reads; without `weights`, what looking at it does.

    What the cache has is not asked for again; without a network it must have all weights.

    Raises:
        CheckpointError: the Hub can't be asked, and weights are missing in its cache.
        HfHubHTTPError: as huggingface_hub's client.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = Path(snapshot_download(model, revision=revision, allow_patterns=[CONFIG]))
    listed = _listed(model, folder.name)
    asked: set[str] = set()
    # What is wanted shows step by step: an index names its shards, a module what it imports.
    while listed is not None:
        wanted = _wanted(folder, listed, allow_pickle, weights)
        missing = {name for name in wanted if name in listed and not (folder / name).is_file()}
        if missing <= asked:
            break
        asked |= missing
        with suppress(LocalEntryNotFoundError):  # without a network; what is missing then is said below
            snapshot_download(model, revision=folder.name, allow_patterns=list(map(glob.escape, sorted(missing))))
    # Any other folder is that of somebody who stands in for the Hub's client.
    if folder.parent.name == "snapshots" and (weights or listed is None):
        names = [CONFIG] if not (folder / CONFIG).is_file() and listed is None else []
        refuse_missing(model, [*names, *missing_weights(folder, listed, allow_pickle)])
    return Snapshot(folder, listed)


def _listed(model: str, commit: str) -> tuple[str, ...] | None:
    """Return the names of a repository's files at a commit, None where that can't be known here."""
    try:
        # Newer clients write the list, which never changes, into the cache, so where there is none the Hub was not
        # reached: asking again would wait for it once more.
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        from huggingface_hub import HfApi

        # HTTPError is that of the HTTP library in use, which has changed between versions.
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

        with suppress(HTTPError, OSError):
            return tuple(HfApi().list_repo_files(model, revision=commit))
        return None
    with suppress(CachedRepoTreeNotFoundError, OSError):
        return tuple(file.path for file in get_cached_repo_tree(model, revision=commit))
    return None


def _wanted(folder: Path, listed: Collection[str], allow_pickle: bool, weights: bool) -> list[str]:
    """Return the files to have in `folder` that are known so far."""
    read = weight_files(listed, folder, allow_pickle)
    along = sidecars_of(folder, listed, read, keeps_class=True, dry=True).along
    if weights:
        return [CONFIG, *_LOOKED_AT, *along, *read]
    return [
        CONFIG,
        *_LOOKED_AT,
        *(name for name in along if "/" not in name and name.endswith(("config.json", ".py"))),
        *(name for name in read if name.endswith(".json")),
    ]


def weight_files(names: Collection[str], folder: Path, allow_pickle: bool) -> list[str]:
    """Return which of the files `names` hold the weights that are read, their index first; empty where none do.

    The shards are those that the index names, if it is in `folder` already.
    """
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    try:
        found = find_weights(names, config, folder, allow_pickle)
    except CheckpointError:  # the reader says so, once what is there has been downloaded
        return []
    shards: list[str] = []
    if found.indexed and (folder / found.file).is_file():
        with suppress(CheckpointError):  # as above
            shards = files_of(found, read_weight_map(folder, found))
    return [found.file, *shards]


def missing_weights(folder: Path, listed: Collection[str] | None, allow_pickle: bool) -> list[str]:
    """Return the weight files of a snapshot that are not in its `folder`."""
    names = listed if listed is not None else [path.name for path in folder.glob("*")]
    read = weight_files(names, folder, allow_pickle)
    if not read and listed is None and not {PICKLE_SINGLE, PICKLE_INDEX} & set(names):
        return [SINGLE]
    # One that the index names and the repository doesn't have can't be downloaded: the reader says so.
    return [name for name in read if not (folder / name).is_file() and (listed is None or name in listed)]


def has_weights(folder: Path, listed: Collection[str] | None, allow_pickle: bool) -> bool:
    """Say whether a snapshot's `folder` has all weights that are read, so that the Hub need not be asked."""
    names = listed if listed is not None else [path.name for path in folder.glob("*")]
    return bool(weight_files(names, folder, allow_pickle)) and not missing_weights(folder, listed, allow_pickle)


def refuse_missing(model: str, names: Collection[str]) -> None:
    """Refuse a model of which files are missing in the Hub's cache, where they can't be downloaded.

    Raises:
        CheckpointError: there are such files.
    """
    if not names:
        return
    raise CheckpointError(
        f"{model} is not whole in the Hub's cache, and {unreachable()}: {short(names)} missing.",
        "Run it once with a network, or download it elsewhere and name the local folder.",
    )


def unreachable() -> str:
    """Say why the Hub can't be asked."""
    from huggingface_hub import constants

    if is_offline():
        return "HF_HUB_OFFLINE is set"
    return f"the Hub at {urlparse(constants.ENDPOINT).netloc} can't be reached"


def is_offline() -> bool:
    """Say whether the Hub may not be asked, by the environment."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE
