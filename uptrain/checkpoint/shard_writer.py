"""Write one safetensors file: its header, then each tensor's bytes, digested on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from uptrain.checkpoint.checksum import Checksum
from uptrain.checkpoint.files import replaced_file
from uptrain.checkpoint.header import TensorInfo
from uptrain.checkpoint.reflink import BLOCK, Span, clone, residue, write_unshared
from uptrain.errors import UptrainError

_NO_SPANS: Mapping[str, Span] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class ShardContents:
    """What one safetensors file is to hold.

    Attributes:
        tensors: its tensors in order; only their names, dtypes and shapes are used.
        chunks: yields the bytes of the tensor of a name, a piece at a time.
        spans: of tensors that are just bytes of another file, where those are. Their blocks are shared where the file
            system can.
    """

    tensors: Sequence[TensorInfo]
    chunks: Callable[[str], Iterable[memoryview]]
    spans: Mapping[str, Span] = field(default_factory=lambda: _NO_SPANS)


def shard_header(tensors: Sequence[TensorInfo], spans: Mapping[str, Span] = _NO_SPANS) -> bytes:
    """Return the safetensors header of `tensors` in this order; only their sizes are used.

    It is padded to 8 bytes. With `spans`, it is padded so that most of their bytes lie in blocks as in their files.

    Source: safetensors, README, section "Format".
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, places = 0, []
    for info in tensors:
        end = position + info.nbytes
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
        if info.name in spans:
            places.append((spans[info.name], position))
        position = end
    text = dump_json_compact(entries)
    text += b" " * ((residue(places) - 8 - len(text)) % BLOCK if places else -len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def dump_json_compact(value: object) -> bytes:
    """Return `value` as JSON bytes without white space."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def write_shard(
    path: Path, shard: ShardContents, checksum: Checksum, on_bytes: Callable[[int], None], ending: str = ".tmp"
) -> None:
    """Write one safetensors file, whole or not at all.

    - `path`: the file.
    - `shard`: what it is to hold.
    - `checksum`: is updated with all bytes of the file.
    - `on_bytes`: called with the number of bytes after each piece.
    - `ending`: what the temporary file's name has after that of `path`.

    Raises:
        UptrainError: a tensor's chunks don't add up to its declared size.
    """
    with replaced_file(path, ending, buffering=0) as file:
        header = shard_header(shard.tensors, shard.spans)
        write_unshared(file.fileno(), memoryview(header), 0, range(0))
        checksum.update(header)
        position = len(header)
        for info in shard.tensors:
            end, span = position + info.nbytes, shard.spans.get(info.name)
            shared = clone(span, file.fileno(), position) if span else range(0)
            for chunk in shard.chunks(info.name):
                checksum.update(chunk)
                write_unshared(file.fileno(), chunk, position, shared)
                position += len(chunk)
                on_bytes(len(chunk))
            if position != end:
                raise UptrainError(f"Tensor {info.name} came out {position - end:+,} bytes off its planned size.")
