"""Open a model from headers alone; those on the Hub are read with range requests, without downloading weights."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from uptrain.checkpoint.adapters import refuse_adapter
from uptrain.checkpoint.download import has_weights, is_offline, missing_weights, refuse_missing
from uptrain.checkpoint.header import ITEM_BITS, TensorInfo, merge_shards
from uptrain.checkpoint.reader import Checkpoint, open_checkpoint, read_config
from uptrain.checkpoint.source import Source, hub_errors, resolve
from uptrain.checkpoint.weight_files import files_of, find_weights, read_weight_map
from uptrain.errors import CheckpointError


def open_headers(model: str, revision: str | None = None, allow_pickle: bool = False) -> tuple[Source, Checkpoint]:
    """Find `model` and open it from its headers; the tensors of a Hub model can then not be read.

    Raises:
        UptrainError: it can't be found, reached or understood.
    """
    source = resolve(model, revision, allow_pickle, weights=False)
    if source.origin != "hub" or has_weights(source.path, source.listed, allow_pickle):
        return source, open_checkpoint(source.path, allow_pickle)
    if is_offline():
        refuse_missing(model, missing_weights(source.path, source.listed, allow_pickle))
    return source, _open_remote(source)


def _open_remote(source: Source) -> Checkpoint:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, SafetensorsParsingError

    api = HfApi()
    with hub_errors(source.name, source.revision):
        names = source.listed or api.list_repo_files(source.name, revision=source.revision)
    refuse_adapter(source.path, names)
    config = read_config(source.path)
    weights = find_weights(names, config, source.name, allow_pickle=True)
    if weights.pickled:
        raise CheckpointError(
            f"{source.name} has no safetensors weights on the Hub.",
            "Convert it without --dry-run and with --allow-pickle, if you trust it.",
        )
    weight_map = read_weight_map(source.path, weights)

    def header(file: str) -> tuple[str, dict[str, TensorInfo]]:
        try:
            found = api.parse_safetensors_file_metadata(source.name, file, revision=source.revision)
        except EntryNotFoundError:
            raise CheckpointError(f"{source.name} has no {file} on the Hub, though {weights.file} lists it.") from None
        except SafetensorsParsingError as error:
            raise CheckpointError(f"{source.name}: {error}") from None
        return file, {name: _info(source, file, name, info) for name, info in _in_order(found.tensors)}

    with hub_errors(source.name, source.revision), ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(header, files_of(weights, weight_map)))
    # Values can't be compared here; the conversion itself compares them.
    tensors = merge_shards(headers, weight_map, source.name, lambda one, other: True)
    index = weights.file if weights.indexed else ""
    absent = tuple(sorted(weight_map.keys() - tensors.keys()))
    return Checkpoint(source.path, config, tensors, remote=True, index=index, absent=absent)


def _in_order(tensors: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(tensors.items(), key=lambda item: item[1].data_offsets)


def _info(source: Source, file: str, name: str, info: Any) -> TensorInfo:
    if info.dtype not in ITEM_BITS:
        raise CheckpointError(f"{source.name}: tensor {name} has dtype {info.dtype}, which uptrain can't read.")
    return TensorInfo(name, info.dtype, tuple(info.shape), file, *info.data_offsets)
