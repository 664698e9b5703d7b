"""Open a checkpoint folder lazily: headers give every tensor, and bytes are read only on demand."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from uptrain.checkpoint.adapters import refuse_adapter
from uptrain.checkpoint.checksum import borrowed_buffer
from uptrain.checkpoint.dtypes import Array, numpy_dtype, raw_bytes
from uptrain.checkpoint.gguf import refuse_gguf
from uptrain.checkpoint.header import TensorInfo, merge_shards, read_shard
from uptrain.checkpoint.jsonfile import read_json
from uptrain.checkpoint.pickles import PickleShards
from uptrain.checkpoint.reflink import Span
from uptrain.checkpoint.weight_files import StoredWeights, locate_weights
from uptrain.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: its config.json, and the place of each tensor. No weights are in memory.

    Attributes:
        path: the folder.
        config: what config.json holds.
        tensors: the stored tensors by name, in the order of their bytes.
        pickles: the opened `.bin` files, None for safetensors.
        remote: whether the weights are only on the Hub; their tensors are known but can't be read.
        index: the name of the index that was read, empty where the weights are one file.
        absent: the tensors that the index lists and no shard holds.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    pickles: PickleShards | None = field(default=None, compare=False)
    remote: bool = False
    index: str = ""
    absent: tuple[str, ...] = ()

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
        for _ in self._spans(info, raw_bytes(out), [(0, info.nbytes)]):
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
        for _ in self._spans(info, raw_bytes(out), [(row * size, size) for row in rows]):
            pass
        return out

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of tensor `name` in pieces of a few MiB; each view is valid until the next.

        Raises:
            CheckpointError: the file ends early or can't be read.
        """
        info = self.tensors[name]
        if self.pickles is not None:
            yield raw_bytes(np.ascontiguousarray(self.pickles.read(info)))
            return
        with borrowed_buffer() as buffer:
            yield from self._spans(info, buffer, [(0, info.nbytes)], reuse=True)

    def equal(self, one: TensorInfo, other: TensorInfo) -> bool:
        """Tell whether two tensors of the same dtype and shape hold the same bytes; they need not be in `tensors`.

        They are read in pieces, up to the first difference.

        Raises:
            CheckpointError: a file ends early or can't be read.
        """
        if self.pickles is not None:
            first, second = (np.ascontiguousarray(self.pickles.read(info)) for info in (one, other))
            return raw_bytes(first) == raw_bytes(second)
        with borrowed_buffer() as mine, borrowed_buffer() as yours:
            for start in range(0, one.nbytes, len(mine)):
                size = min(len(mine), one.nbytes - start)
                for info, buffer in ((one, mine), (other, yours)):
                    for _ in self._spans(info, buffer[:size], [(start, size)]):
                        pass
                if bytes(mine[:size]) != bytes(yours[:size]):
                    return False
        return True

    def span(self, name: str) -> Span | None:
        """Return the place of the bytes of tensor `name`, None where no file has exactly those bytes."""
        info = self.tensors[name]
        whole = self.pickles is None and not self.remote
        return Span(self.path / info.file, info.start, info.nbytes) if whole else None

    def prefetch(self, names: Iterable[str]) -> None:
        """Let the operating system read tensors before they are used, where it can; errors are raised on use."""
        if self.pickles is not None or not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            info = self.tensors[name]
            with suppress(OSError), (self.path / info.file).open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), info.start, info.nbytes, os.POSIX_FADV_WILLNEED)

    def _spans(
        self, info: TensorInfo, buffer: memoryview, places: Iterable[tuple[int, int]], reuse: bool = False
    ) -> Iterator[memoryview]:
        """Read places of a tensor into a buffer, and yield each piece that was read.

        - `info`: the tensor.
        - `buffer`: receives the bytes.
        - `places`: an offset and a number of bytes each.
        - `reuse`: whether each piece overwrites the one before; without it, the pieces follow each other.
        """
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
                            raise CheckpointError(
                                f"{path} ends inside tensor {info.name}: it changed while being read."
                            )
                        yield target[:count]
                        done += count
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise CheckpointError(f"{path} can't be read at tensor {info.name}: {reason}.") from None


def open_checkpoint(path: Path, allow_pickle: bool = False) -> Checkpoint:
    """Open the checkpoint in folder `path` from its config, index and headers, with the files that transformers reads.

    Raises:
        CheckpointError: there are no config or weights, the index is unsafe or wrong, or a shard is missing, cut short
            or corrupt.
    """
    config = read_config(path)
    return open_weights(path, config, locate_weights(path, config, allow_pickle))


def open_weights(path: Path, config: dict[str, Any], stored: StoredWeights) -> Checkpoint:
    """Open the weights that were located in folder `path`, from their headers.

    - `path`: the folder.
    - `config`: its config.json.
    - `stored`: as `locate_weights` returned it.

    Raises:
        CheckpointError: a shard is cut short or corrupt, or two shards differ in a tensor.
    """
    pickles = PickleShards(path) if stored.weights.pickled else None
    shards = ((name, pickles.header(name) if pickles else read_shard(path, name)) for name in stored.files)
    opened = Checkpoint(path, config, {}, pickles, index=stored.index)
    tensors = merge_shards(shards, stored.weight_map, path, opened.equal)
    return replace(opened, tensors=tensors, absent=tuple(sorted(stored.weight_map.keys() - tensors.keys())))


def read_config(path: Path) -> dict[str, Any]:
    """Read `config.json` of folder `path`.

    Raises:
        CheckpointError: the folder has none, it isn't one JSON object, or the folder holds an adapter.
    """
    refuse_adapter(path)
    if not (path / "config.json").is_file():
        refuse_gguf(path)
        raise CheckpointError(
            f"{path} has no config.json, so it isn't a Hugging Face checkpoint.",
            "Name the folder that holds config.json and the .safetensors files.",
        )
    return read_json(path / "config.json")
