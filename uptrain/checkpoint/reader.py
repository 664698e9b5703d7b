"""Open a checkpoint folder lazily: every tensor known from headers, bytes read only when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from uptrain.checkpoint.arrays import Array, numpy_dtype, raw_bytes
from uptrain.checkpoint.checksum import borrowed_buffer
from uptrain.checkpoint.clone import Span
from uptrain.checkpoint.gguf import refuse_gguf
from uptrain.checkpoint.header import TensorInfo, read_header
from uptrain.checkpoint.jsonfile import read_json
from uptrain.checkpoint.pickles import PickleShards
from uptrain.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_SINGLE = "pytorch_model.bin"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: its config, and each tensor's place. Nothing of the weights is in memory.

    `remote` says that the weights are on the Hub only: the tensors are known, but can't be read.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    pickles: PickleShards | None = field(default=None, compare=False)
    remote: bool = False

    @property
    def files(self) -> list[str]:
        """Return the weight files' names, in order."""
        return sorted({info.file for info in self.tensors.values()})

    def read(self, name: str) -> Array:
        """Return tensor `name` in its own dtype and shape.

        Raises:
            CheckpointError: the tensor's bytes can't be read.
        """
        info = self.tensors[name]
        if self.pickles is not None:
            return self.pickles.read(info)
        out = np.empty(info.shape, numpy_dtype(info.dtype))
        for _ in self._spans(name, raw_bytes(out), [(0, info.nbytes)]):
            pass
        return out

    def read_rows(self, name: str, rows: Sequence[int]) -> Array:
        """Return rows of tensor `name`, (len(rows), …) in its own dtype, without reading the others.

        Raises:
            CheckpointError: the tensor has no such row, or its bytes can't be read.
        """
        info = self.tensors[name]
        if max(rows, default=-1) >= info.shape[0]:
            raise CheckpointError(
                f"Tensor {name} has {info.shape[0]} rows, but row {max(rows)} is asked for.",
                "If it holds the tokens' embeddings, the tokenizer may be another model's.",
            )
        if self.pickles is not None:
            return self.pickles.read(info)[list(rows)]
        out = np.empty((len(rows), *info.shape[1:]), numpy_dtype(info.dtype))
        size = out[:1].nbytes
        for _ in self._spans(name, raw_bytes(out), [(row * size, size) for row in rows]):
            pass
        return out

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of tensor `name` a few MiB at a time; each view is valid until the next.

        Raises:
            CheckpointError: the file ends early or can't be read.
        """
        info = self.tensors[name]
        if self.pickles is not None:
            yield raw_bytes(np.ascontiguousarray(self.pickles.read(info)))
            return
        with borrowed_buffer() as buffer:
            yield from self._spans(name, buffer, [(0, info.nbytes)], reuse=True)

    def span(self, name: str) -> Span | None:
        """Return where the bytes of tensor `name` lie, or None where no file has them as they are."""
        info = self.tensors[name]
        whole = self.pickles is None and not self.remote
        return Span(self.path / info.file, info.start, info.nbytes) if whole else None

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask the operating system to read tensors ahead of their use, where it can; errors come when they are read."""
        if self.pickles is not None or not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            info = self.tensors[name]
            with suppress(OSError), (self.path / info.file).open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), info.start, info.nbytes, os.POSIX_FADV_WILLNEED)

    def _spans(
        self, name: str, buffer: memoryview, places: Iterable[tuple[int, int]], reuse: bool = False
    ) -> Iterator[memoryview]:
        """Read places of tensor `name`, each an offset and a count of bytes, into `buffer`.

        They come one after the other, or each read over the one before if `reuse`.
        """
        info = self.tensors[name]
        path = self.path / info.file
        try:
            with path.open("rb", buffering=0) as file:
                done = end = 0
                for offset, size in places:
                    file.seek(info.start + offset)
                    end += size
                    while done < end:
                        target = buffer if reuse else buffer[done:]
                        count = file.readinto(target[: end - done])
                        if not count:
                            raise CheckpointError(f"{path} ends inside tensor {name}: it changed while being read.")
                        yield target[:count]
                        done += count
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise CheckpointError(f"{path} can't be read at tensor {name}: {reason}.") from None


def open_checkpoint(path: Path, allow_pickle: bool = False) -> Checkpoint:
    """Open the checkpoint in folder `path` from its config, index and headers.

    Raises:
        CheckpointError: no config or weights, an unsafe or wrong index, a missing, cut or corrupt shard.
    """
    config = read_config(path)
    if (path / INDEX).is_file():
        tensors = _indexed(path, INDEX, ".safetensors")
    elif (path / SINGLE).is_file():
        tensors = read_header(path / SINGLE)
    else:
        return _open_pickles(path, config, allow_pickle)
    return Checkpoint(path, config, tensors)


def read_config(path: Path) -> dict[str, Any]:
    """Read `config.json` of folder `path`.

    Raises:
        CheckpointError: the folder has none, or it isn't one JSON object.
    """
    if not (path / "config.json").is_file():
        refuse_gguf(path)
        raise CheckpointError(
            f"{path} has no config.json, so it isn't a Hugging Face checkpoint.",
            "Name the folder that holds config.json and the .safetensors files.",
        )
    return read_json(path / "config.json")


def _open_pickles(path: Path, config: dict[str, Any], allow_pickle: bool) -> Checkpoint:
    indexed, single = (path / PICKLE_INDEX).is_file(), (path / PICKLE_SINGLE).is_file()
    if not indexed and not single:
        refuse_gguf(path)
        raise CheckpointError(f"{path} has no {SINGLE} and no {INDEX}.", "Name a folder with safetensors weights.")
    if not allow_pickle:
        raise CheckpointError(
            f"{path} has only pickled .bin weights, which can run code when they are read.",
            "If you trust them, add --allow-pickle (they are still read with weights_only=True).",
        )
    names = _shard_names(path, PICKLE_INDEX, ".bin") if indexed else [PICKLE_SINGLE]
    pickles = PickleShards(path)
    return Checkpoint(path, config, pickles.headers(names), pickles)


def _shard_names(path: Path, index: str, ending: str) -> list[str]:
    weight_map = read_json(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / index} has no weight_map.", "Download it again.")
    for name in weight_map.values():
        check_shard_name(path / index, name, ending)
    return sorted(set(weight_map.values()))


def check_shard_name(index: Path, name: Any, ending: str) -> None:
    """Refuse a shard name that isn't a plain file name inside the index's own folder.

    Raises:
        CheckpointError: not text, absolute, with `..` or a drive letter, in another folder, or of another ending.
    """
    plain = isinstance(name, str) and name.endswith(ending) and "\0" not in name and len(os.fsencode(name)) < 256
    if not plain or len(PurePosixPath(name).parts) != 1 or len(PureWindowsPath(name).parts) != 1:
        raise CheckpointError(
            f"{index} points to {str(name)[:200]!r}, which is not a {ending} file in its own folder.",
            "Don't use this checkpoint unless you know who wrote it.",
        )


def _indexed(path: Path, index: str, ending: str) -> dict[str, TensorInfo]:
    names = _shard_names(path, index, ending)
    tensors: dict[str, TensorInfo] = {}
    for shard in names:
        if not (path / shard).is_file():
            raise CheckpointError(f"{path / shard} is missing, though {index} lists it.", "Download it again.")
        for name, info in read_header(path / shard).items():
            if name in tensors:
                raise CheckpointError(f"Tensor {name} stands in both {tensors[name].file} and {shard}.")
            tensors[name] = info
    for name, shard in read_json(path / index)["weight_map"].items():
        if name not in tensors or tensors[name].file != shard:
            raise CheckpointError(f"{path / index} lists tensor {name} in {shard}, which doesn't hold it.")
    return tensors
