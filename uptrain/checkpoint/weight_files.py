"""Find the files that hold a model's weights: those that transformers' `from_pretrained` reads, in its order."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from uptrain.checkpoint.gguf import refuse_gguf
from uptrain.checkpoint.jsonfile import read_json
from uptrain.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
ORDER = (SINGLE, INDEX, PICKLE_SINGLE, PICKLE_INDEX)
"""The files that transformers looks for, in its order. Source: transformers, `_get_resolved_checkpoint_files`."""
EXPLICIT = "transformers_weights"
"""The key of config.json that names another weight file or index, which transformers then reads instead."""

_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.(safetensors|bin)")
_VARIANT = re.compile(
    r"(?:model|pytorch_model)(?:\.(?:safetensors|bin)\.index)?\.(?!safetensors|bin|index)([\w-]+?)(?:-\d{5}-of-\d{5})?"
    r"\.(?:safetensors|bin|json)"
)
_OTHERS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")
SAVE_AGAIN = "Load it with transformers' from_pretrained, save it with save_pretrained, and name that folder."


@dataclass(frozen=True)
class WeightFiles:
    """Where the weights are: in `file`, or in the shards that it names if it is an index."""

    file: str

    @property
    def indexed(self) -> bool:
        """Tell whether `file` is an index."""
        return self.file.endswith(".index.json")

    @property
    def pickled(self) -> bool:
        """Tell whether the weights are pickles."""
        return self.ending == ".bin"

    @property
    def ending(self) -> str:
        """Return how the names of the weight files end."""
        return PurePosixPath(self.file.removesuffix(".index.json")).suffix


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """The weight files of a folder; none of them is missing.

    - `weights`: the one weight file, or the index.
    - `weight_map`: the shard in which the index lists each tensor; empty without an index.
    - `files`: the files that hold tensors, in the order in which transformers reads them.
    - `has_metadata`: False where the index lacks the metadata that transformers needs.
    """

    weights: WeightFiles
    weight_map: Mapping[str, str]
    files: tuple[str, ...]
    has_metadata: bool

    @property
    def index(self) -> str:
        """Return the name of the index, empty where the weights are one file."""
        return self.weights.file if self.weights.indexed else ""


def locate_weights(path: Path, config: Mapping[str, Any], allow_pickle: bool) -> StoredWeights:
    """Find the weight files of folder `path`, as transformers does, and read their index.

    - `path`: the folder.
    - `config`: its config.json.
    - `allow_pickle`: whether the user trusts `.bin` weights.

    Raises:
        CheckpointError: there are no weights, they are pickles without permission, the index is broken or unsafe, or
            a file is missing.
    """
    names = names_in(path, config)
    if not any(name.endswith((".safetensors", ".bin", ".index.json")) for name in names):
        refuse_gguf(path)
    weights = find_weights(names, config, path, allow_pickle)
    listed = read_json(path / weights.file) if weights.indexed else {}
    weight_map = _weight_map(path, weights, listed) if weights.indexed else {}
    files = files_of(weights, weight_map)
    for name in files:
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing, though {weights.file} lists it.", "Download it again.")
    metadata = not weights.indexed or isinstance(listed.get("metadata"), dict)
    return StoredWeights(weights=weights, weight_map=weight_map, files=tuple(files), has_metadata=metadata)


def find_weights(
    names: Collection[str], config: Mapping[str, Any], where: str | Path, allow_pickle: bool
) -> WeightFiles:
    """Return which of the files `names` holds the weights or is their index, as transformers decides it.

    - `names`: the files of the folder or repository, relative to it.
    - `config`: its config.json.
    - `where`: what errors call it.
    - `allow_pickle`: whether the user trusts `.bin` weights.

    Raises:
        CheckpointError: transformers would read none of the files, they are pickles without permission, or a name is
            unsafe.
    """
    distributed = min(filter(_DISTRIBUTED.fullmatch, names), default=None)
    if distributed:
        raise CheckpointError(
            f"{where} holds a distributed checkpoint, which transformers reads before any other weights: "
            f"{distributed}.",
            SAVE_AGAIN,
        )
    found = _explicit(names, config, where) or next((name for name in ORDER if name in names), None)
    if found is None:
        raise _nothing(names, where)
    weights = WeightFiles(found)
    if weights.pickled and not allow_pickle:
        raise CheckpointError(
            f"{where} has only pickled .bin weights, which can run code when they are read.",
            "If you trust them, add --allow-pickle (in a recipe: allow_pickle: true; in Python: allow_pickle=True). "
            "They are still read with weights_only=True.",
        )
    return weights


def _explicit(names: Collection[str], config: Mapping[str, Any], where: str | Path) -> str | None:
    name = config.get(EXPLICIT)
    if name is None:
        return None
    endings = (".safetensors", ".safetensors.index.json")
    ending = next((each for each in endings if isinstance(name, str) and name.endswith(each)), endings[0])
    check_shard_name(Path(str(where)) / "config.json", name, ending)
    if name not in names:
        raise CheckpointError(
            f"{where} lacks its weight file, which config.json names as {EXPLICIT}: {name}.", "Download it again."
        )
    return str(name)


def _nothing(names: Collection[str], where: str | Path) -> CheckpointError:
    """Return the error for files without weights that transformers would read; it names what is there instead."""
    tops = sorted(name for name in names if "/" not in name)
    variants = sorted({match[1] for match in map(_VARIANT.fullmatch, tops) if match})
    if variants:
        return CheckpointError(
            f"{where} has no {SINGLE}, only the variant {variants[0]} of it.",
            f"Save it without: from_pretrained(…, variant={variants[0]!r}), then save_pretrained(NEW), and name NEW.",
        )
    shards = [name for name in tops if _SHARD.fullmatch(name)]
    if shards:
        return CheckpointError(
            f"{where} has no index of its shards: {shards[0]} is one of {len(shards)}.",
            f"Download {INDEX if shards[0].endswith('.safetensors') else PICKLE_INDEX} too: without it nobody can tell "
            "whether all are there.",
        )
    others = [name for name in tops if name.endswith(_OTHERS)]
    if others:
        return CheckpointError(
            f"{where} has no {SINGLE} and no {INDEX}; transformers doesn't read {others[0]}.",
            "If it holds the whole model under transformers' names, rename it to "
            f"{SINGLE}; else download or save the model in transformers' format."
            if others[0].endswith(".safetensors")
            else "Download or save the model in transformers' format.",
        )
    return CheckpointError(f"{where} has no {SINGLE} and no {INDEX}.", "Name a folder with safetensors weights.")


def names_in(path: Path, config: Mapping[str, Any]) -> set[str]:
    """Return the files of folder `path` that can hold weights: files at its top, and the one that `config` names.

    Raises:
        CheckpointError: the folder can't be read.
    """
    try:
        names = {entry.name for entry in path.iterdir() if entry.is_file()}
        explicit = config.get(EXPLICIT)
        if isinstance(explicit, str) and "\0" not in explicit and (path / explicit).is_file():
            names.add(explicit)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {os.strerror(error.errno or 0)}.") from None
    return names


def read_weight_map(path: Path, weights: WeightFiles) -> dict[str, str]:
    """Return the shard in which the index lists each tensor; empty where the weights have no index.

    Raises:
        CheckpointError: the index is broken, or names a file outside the folder `path`.
    """
    return _weight_map(path, weights, read_json(path / weights.file)) if weights.indexed else {}


def _weight_map(path: Path, weights: WeightFiles, listed: Mapping[str, Any]) -> dict[str, str]:
    index, weight_map = path / weights.file, listed.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map.", "Download it again.")
    for name in weight_map.values():
        check_shard_name(index, name, weights.ending)
    return weight_map


def files_of(weights: WeightFiles, weight_map: Mapping[str, str]) -> list[str]:
    """Return the files that hold the weights, in the order in which transformers reads them."""
    return sorted(set(weight_map.values())) if weights.indexed else [weights.file]


def check_shard_name(index: Path, name: Any, ending: str) -> None:
    """Refuse a shard name that isn't a plain path of a file in the index's folder or below it.

    Raises:
        CheckpointError: the name is no text or absolute, or has `..`, a backslash, a drive letter or another ending.
            So is a name that is not in its shortest spelling, or below a link out of the index's folder.
    """
    plain = isinstance(name, str) and name.endswith(ending) and "\0" not in name and "\\" not in name
    if plain:
        path = PurePosixPath(name)
        # Another spelling of the same path would make one file look like two.
        plain = str(path) == name and not path.is_absolute() and ".." not in path.parts
        plain = plain and not PureWindowsPath(name).drive and max(len(os.fsencode(part)) for part in path.parts) < 256
        plain = plain and len(os.fsencode(name)) < 1024 and _stays_inside(index.parent, path)
    if not plain:
        raise CheckpointError(
            f"{index} points to {str(name)[:200]!r}, which is not a {ending} file in its own folder.",
            "Don't use this checkpoint unless you know who wrote it.",
        )


def _stays_inside(folder: Path, name: PurePosixPath) -> bool:
    """Tell whether the folder of `name` is in `folder`, links followed; the file itself may be a link."""
    if len(name.parts) == 1:
        return True
    try:
        return (folder / name.parent).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a link to itself
        return False
