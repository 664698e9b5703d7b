"""Choose the files of a checkpoint that are copied into its result, such as a tokenizer's.

Weights are not copied, nor files that describe only the old weights.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from uptrain.checkpoint.jsonfile import JSON_LIMIT
from uptrain.checkpoint.manifest import EVALUATION, MANIFEST, SIGNATURE
from uptrain.errors import CheckpointError

CONFIG = "config.json"
MODULES = "modules.json"
"""The file that lists the modules which sentence-transformers applies to a model's output, each in its folder."""
READERS = ("AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor", "AutoVideoProcessor")
"""The Auto classes that read a model's input; their code does not depend on its attention."""

WEIGHTS = "other weights"
TRAINING = "training state"
STALE = "true of the old weights only"
CODE = "code of the old class"
CARD = "the old card, its pictures and sounds"
ARCHIVE = "archives"
HIDDEN = "hidden files and caches"
LINK = "links out of the folder, or no files"
ODD = "names that can't be printed"
UNCACHED = "not in the Hub's cache"
REASONS = (WEIGHTS, TRAINING, STALE, CODE, CARD, ARCHIVE, HIDDEN, LINK, ODD, UNCACHED)

_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|h5|hdf5|keras|msgpack|onnx|gguf|ggml|tflite|litertlm|pte|ot|pkl|pickle|joblib|np[yz]"
    r"|distcp|nemo|mlmodel|mlpackage|engine|trt|llamafile|pdparams|dduf)$"
    r"|\.onnx[._]data[^/]*$|\.ckpt\.(index|meta|data-[^/]*)$|\.(safetensors|bin|gguf|pth)[.-]?(part|split)[^/]*$",
    re.IGNORECASE,
)
_WEIGHT_FOLDERS = ("original", "onnx", "openvino", "gguf")
_TRAINING_FOLDERS = re.compile(r"checkpoint-\d+|global_step\d+|runs|wandb|mlruns|lightning_logs")
_TRAINING = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states)(_?\d+)?(\.\w+)?|training_args\.\w+|trainer_state\.json"
    r"|train(er|ing)?_log\.\w+|(all|train|eval|test|predict|generate)_results\.json|events\.out\.tfevents.*|latest"
    r"|zero_to_fp32\.py"
)
_STALE = re.compile(
    rf".+\.index\.json|{re.escape(SIGNATURE)}|{re.escape(EVALUATION)}|report\.html|params\.json|adapter_config\.json"
    r"|.*imatrix.*\.(dat|gguf)"
)
_CARD = re.compile(r"(readme|model[_-]?card)\b.*|readme_.*", re.IGNORECASE)
_PICTURE = re.compile(
    r"\.(png|jpe?g|gif|svg|webp|avif|bmp|ico|tiff?|pdf|mp4|mov|webm|mp3|wav|flac|ogg)$", re.IGNORECASE
)
_LICENCE = re.compile(r"(.*[ ._-])?(licen[cs]e|copying)([ ._-].*)?", re.IGNORECASE)
_CODE = re.compile(r"\.(pyc?|so|dll|dylib|c|cc|cpp|cu|cuh|h|hpp)$", re.IGNORECASE)
_ARCHIVE = re.compile(r"\.(zip|tar|gz|tgz|xz|zst|bz2|7z|rar)$", re.IGNORECASE)
_CACHE = re.compile(
    r"\..*|__pycache__|.*(~|\.(tmp|lock|incomplete|partial|swp))|Thumbs\.db|desktop\.ini", re.IGNORECASE
)
_RELATIVE_IMPORT = re.compile(r"^\s*(?:from\s+\.([\w.]+)\s+import\b|from\s+\.\s+import\s+(\w+))", re.MULTILINE)


@dataclass(frozen=True)
class Sidecars:
    """The files of a checkpoint that are not its weights, config or manifest, of which the result has its own.

    Attributes:
        copied: the names of the files that are copied, relative to the checkpoint's folder.
        left_out: the names of the files that are not copied, by the reason.
    """

    copied: tuple[str, ...]
    left_out: Mapping[str, tuple[str, ...]]

    def summary(self) -> str:
        """Return what is left out in one line: names (of one folder as one) and the reason; empty if nothing is."""
        return "; ".join(f"{short(names)} ({reason})" for reason, names in self.left_out.items())

    def nbytes(self, folder: Path) -> int:
        """Return the bytes of the copied files in `folder`."""
        return sum((folder / name).stat().st_size for name in self.copied)

    def to_dict(self) -> dict[str, Any]:
        """Return both as plain JSON values."""
        return {"goes_along": list(self.copied), "left_out": {why: list(names) for why, names in self.left_out.items()}}


def short(names: Collection[str], most: int = 5) -> str:
    """Return names in one line: a folder's files as that folder, many of one kind as `*.bin`, at most `most`."""
    kinds = Counter(PurePosixPath(name).suffix for name in names if "/" not in name)
    groups: Counter[str] = Counter()
    for name in names:
        top, inside, _ = name.partition("/")
        suffix = PurePosixPath(name).suffix
        groups[f"{top}/" if inside else f"*{suffix}" if suffix and kinds[suffix] >= most else name] += 1
    words = [f"{name} ({count} files)" if count > 1 else name for name, count in groups.most_common()]
    rest = len(words) - most
    return ", ".join(words if rest <= 1 else [*words[:most], f"{rest} more"])


def sidecars_of(
    folder: Path,
    listed: Collection[str] | None = None,
    read: Collection[str] = (),
    *,
    keeps_class: bool = False,
    dry: bool = False,
) -> Sidecars:
    """Return which files of a checkpoint are copied, by one rule for folders and for repositories of the Hub.

    - `folder`: the checkpoint, or the part of it that is downloaded so far.
    - `listed`: the names of all files of a Hub repository; None to list the folder.
    - `read`: the weight files and the index that are read, which are neither copied nor left out.
    - `keeps_class`: whether the result has the same config, so that the code it names still fits.
    - `dry`: whether files that would be copied from a repository need not be in `folder` yet.

    Raises:
        CheckpointError: a folder, or a file to be copied, can't be read.
    """
    names, links = (set(listed), {}) if listed is not None else _files(folder)
    code = code_named(folder, keeps_class=keeps_class)
    modules = _module_folders(folder)
    inner = {
        name.rpartition("/")[0]
        for name in names
        if "/" in name and _WEIGHTS.search(name) and not name.startswith(modules)
    }
    copied: list[str] = []
    found: dict[str, list[str]] = {reason: [] for reason in REASONS}
    for name in sorted(names):
        if name in (CONFIG, MANIFEST) or name in read:
            continue
        reason = _reason(name, code, modules, inner)
        if reason is None and not dry and not (folder / name).is_file():
            reason = UNCACHED
        (copied if reason is None else found[reason]).append(name)
    for name, reason in links.items():
        found[reason].append(name)
    for name in copied:
        if (folder / name).is_file() and not os.access(folder / name, os.R_OK):
            raise CheckpointError(f"{folder / name} can't be read: {os.strerror(errno.EACCES)}.", "Change its mode.")
    return Sidecars(tuple(copied), {reason: tuple(names) for reason, names in found.items() if names})


def _reason(name: str, code: Collection[str], modules: tuple[str, ...], inner: Collection[str]) -> str | None:
    """Return why a file is left out, None if it is copied."""
    parts = PurePosixPath(name).parts
    last, folders = parts[-1], parts[:-1]
    above = ["/".join(folders[: depth + 1]) for depth in range(len(folders))]
    if not name.isprintable() or ".." in parts or name.startswith("/"):
        return ODD
    if any(_CACHE.fullmatch(part) for part in parts):
        return HIDDEN
    if any(_TRAINING_FOLDERS.fullmatch(part) for part in folders) or _TRAINING.fullmatch(last):
        return TRAINING
    if modules and name.startswith(modules) and last.endswith(".safetensors"):
        return None
    if any(map(_WEIGHTS.search, parts)) or any(map(inner.__contains__, above)):
        return WEIGHTS
    if folders and folders[0] in _WEIGHT_FOLDERS and not name.startswith(modules):
        return WEIGHTS
    if _STALE.fullmatch(last):
        return STALE
    if _CODE.search(last):
        return None if name in code else CODE
    if _LICENCE.fullmatch(last):
        return None
    if _CARD.fullmatch(last) or _PICTURE.search(last):
        return CARD
    return ARCHIVE if _ARCHIVE.search(last) else None


def names_licence(name: str) -> bool:
    """Tell whether a file of this name at the top of a folder is a licence's text."""
    return _LICENCE.fullmatch(name) is not None


def code_named(folder: Path, keeps_class: bool = False) -> set[str]:
    """Return the Python files that a checkpoint's configs name as code of its tokenizer, processors and modules.

    They need not exist. Files in `folder` that they import relatively are included, and with `keeps_class` the code of
    the model's own class.
    """
    wanted: list[str] = []
    for path in sorted(folder.glob("*config.json")):
        for auto, reference in _auto_map(path).items():
            if keeps_class or auto in READERS:
                wanted += _modules(reference)
    for module in _list(folder / MODULES):
        kind = module.get("type") if isinstance(module, dict) else None
        if isinstance(kind, str) and not kind.startswith("sentence_transformers."):
            wanted += _modules(kind)
    found: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        found.add(name)
        if not (folder / name).is_file():
            continue
        with suppress(UnicodeDecodeError):
            package = PurePosixPath(name).parent
            for match in _RELATIVE_IMPORT.finditer((folder / name).read_text(encoding="utf-8")):
                wanted.append((package / f"{(match[1] or match[2]).replace('.', '/')}.py").as_posix())
    return found


def reading_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a config's `auto_map` for classes that read a model's input; a result keeps them."""
    own = config.get("auto_map")
    return {auto: own[auto] for auto in READERS if auto in own} if isinstance(own, dict) else {}


def reading_code_of(folder: Path) -> dict[str, Any]:
    """Return the entries of all configs of a folder for classes that read a model's input, as `reading_code`."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*config.json")):
        found |= reading_code({"auto_map": _auto_map(path)})
    return found


def _auto_map(path: Path) -> dict[str, Any]:
    found = _parsed(path)
    own = found.get("auto_map") if isinstance(found, dict) else None
    return own if isinstance(own, dict) else {}


def _list(path: Path) -> list[Any]:
    found = _parsed(path)
    return found if isinstance(found, list) else []


def _parsed(path: Path) -> Any:
    """Return what a JSON file holds, None where it is missing or not JSON; such a file is copied as it is."""
    if not path.is_file() or path.stat().st_size > JSON_LIMIT:
        return None
    with suppress(ValueError, RecursionError):
        return json.loads(path.read_bytes())
    return None


def _modules(reference: Any) -> Iterator[str]:
    """Yield the file of each class that an auto_map's value names, except classes of another repository."""
    for each in reference if isinstance(reference, list) else [reference]:
        if isinstance(each, str) and "--" not in each and "." in each:
            yield each.rpartition(".")[0].replace(".", "/") + ".py"


def _module_folders(folder: Path) -> tuple[str, ...]:
    paths = (module.get("path") for module in _list(folder / MODULES) if isinstance(module, dict))
    return tuple(f"{path.strip('/')}/" for path in paths if isinstance(path, str) and path.strip("/."))


def _files(folder: Path) -> tuple[set[str], dict[str, str]]:
    """Return the files below a folder, and the reason to leave out each entry that is not a file of its own."""

    def refuse(error: OSError) -> None:
        raise CheckpointError(f"{error.filename} can't be read: {os.strerror(error.errno or 0)}.") from None

    names: set[str] = set()
    left: dict[str, str] = {}
    home = folder.resolve()
    for place, below, files in os.walk(folder, onerror=refuse):
        at = Path(place).relative_to(folder)
        for name in list(below):
            path = (at / name).as_posix()
            if _CACHE.fullmatch(name):
                below.remove(name)
                left[f"{path}/"] = HIDDEN
            elif (folder / path).is_symlink():
                left[f"{path}/"] = LINK
        for name in files:
            path = (at / name).as_posix()
            if _is_own(folder / path, home):
                names.add(path)
            else:
                left[path] = LINK
    return names, left


def _is_own(path: Path, home: Path) -> bool:
    """Tell whether `path` is a file of the folder `home`, and not a link to a file of somebody else.

    The Hub's cache has links to its blobs, and users link a checkpoint's files into a folder with another config.
    """
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    try:
        if not path.is_symlink():
            return path.is_file()
        goal = path.resolve()
        if not goal.is_file() or home in goal.parents or cache in goal.parents:
            return goal.is_file()
        linked = goal.name == path.name and (goal.parent / CONFIG).is_file()
        return linked and any(each.name.endswith(".safetensors") for each in goal.parent.iterdir())
    except (OSError, RuntimeError):  # a link to itself, or to a file that can't be read
        return False


def copy_sidecars(folder: Path, sidecars: Sidecars, out: Path) -> None:
    """Copy the sidecars from `folder` into the unfinished result `out`.

    Raises:
        CheckpointError: a file was removed since the run began.
    """
    for name in sidecars.copied:
        goal = out / name
        if not goal.parent.is_dir():
            goal.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(folder / name, goal)
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder / name} is gone: it was there when the run began.", "Run the same command again."
            ) from None
