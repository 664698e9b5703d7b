"""Download the files of a Hub repository that are read: its weights, and the files copied with them."""

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
"""Files, besides configs, that say where a model comes from and of which kind it is."""


@dataclass(frozen=True)
class Snapshot:
    """The part of a repository that is in the Hub's cache.

    Attributes:
        folder: the cached files.
        listed: the names of all files of the repository, None where neither the Hub nor the cache lists them.
    """

    folder: Path
    listed: tuple[str, ...] | None


def download(model: str, revision: str | None, allow_pickle: bool, weights: bool) -> Snapshot:
    """Download the files that a conversion of `model` reads.

    A file in the cache is not requested again. Without a network the cache must hold all weights.

    - `model`: the repository's id.
    - `revision`: a branch, tag or commit, None for the main branch.
    - `allow_pickle`: whether the user trusts `.bin` weights.
    - `weights`: whether to download the weights too; without them, the files that `inspect` reads.

    Raises:
        CheckpointError: the Hub can't be reached, and weights are missing in its cache.
        HfHubHTTPError: as huggingface_hub's client.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = Path(snapshot_download(model, revision=revision, allow_patterns=[CONFIG]))
    listed = _listed(model, folder.name)
    asked: set[str] = set()
    # Files name further files: an index names its shards, a module what it imports.
    while listed is not None:
        wanted = _wanted(folder, listed, allow_pickle, weights)
        missing = {name for name in wanted if name in listed and not (folder / name).is_file()}
        if missing <= asked:
            break
        asked |= missing
        with suppress(LocalEntryNotFoundError):  # without a network; missing files are refused below
            snapshot_download(model, revision=folder.name, allow_patterns=list(map(glob.escape, sorted(missing))))
    # Any other folder comes from a replacement of the Hub's client.
    if folder.parent.name == "snapshots" and (weights or listed is None):
        names = [CONFIG] if not (folder / CONFIG).is_file() and listed is None else []
        refuse_missing(model, [*names, *missing_weights(folder, listed, allow_pickle)])
    return Snapshot(folder, listed)


def _listed(model: str, commit: str) -> tuple[str, ...] | None:
    """Return the names of a repository's files at a commit, None where they can't be known."""
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
    """Return the files that `folder` should hold, as far as they are known."""
    read = weights_among(listed, folder, allow_pickle)
    along = sidecars_of(folder, listed, read, keeps_class=True, dry=True).copied
    if weights:
        return [CONFIG, *_LOOKED_AT, *along, *read]
    return [
        CONFIG,
        *_LOOKED_AT,
        *(name for name in along if "/" not in name and name.endswith(("config.json", ".py"))),
        *(name for name in read if name.endswith(".json")),
    ]


def weights_among(names: Collection[str], folder: Path, allow_pickle: bool) -> list[str]:
    """Return the files among `names` that hold the weights, their index first; empty where there are none.

    The shards are included if the index that names them is in `folder` already.
    """
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    try:
        found = find_weights(names, config, folder, allow_pickle)
    except CheckpointError:  # the reader raises it again, after the download
        return []
    shards: list[str] = []
    if found.indexed and (folder / found.file).is_file():
        with suppress(CheckpointError):  # as above
            shards = files_of(found, read_weight_map(folder, found))
    return [found.file, *shards]


def missing_weights(folder: Path, listed: Collection[str] | None, allow_pickle: bool) -> list[str]:
    """Return the weight files of a snapshot that are not in its `folder`."""
    names = listed if listed is not None else [path.name for path in folder.glob("*")]
    read = weights_among(names, folder, allow_pickle)
    if not read and listed is None and not {PICKLE_SINGLE, PICKLE_INDEX} & set(names):
        return [SINGLE]
    # The reader refuses a shard that the index names and the repository doesn't have.
    return [name for name in read if not (folder / name).is_file() and (listed is None or name in listed)]


def has_weights(folder: Path, listed: Collection[str] | None, allow_pickle: bool) -> bool:
    """Tell whether a snapshot's `folder` has all weights that are read, so that no request to the Hub is needed."""
    names = listed if listed is not None else [path.name for path in folder.glob("*")]
    return bool(weights_among(names, folder, allow_pickle)) and not missing_weights(folder, listed, allow_pickle)


def refuse_missing(model: str, names: Collection[str]) -> None:
    """Refuse a model with files missing in the Hub's cache that can't be downloaded.

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
    """Return why the Hub can't be reached."""
    from huggingface_hub import constants

    if is_offline():
        return "HF_HUB_OFFLINE is set"
    return f"the Hub at {urlparse(constants.ENDPOINT).netloc} can't be reached"


def is_offline() -> bool:
    """Tell whether the environment forbids requests to the Hub."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE
