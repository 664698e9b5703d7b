"""Open a model from headers alone: on the Hub they are read through range requests, and no weights are downloaded."""

from __future__ import annotations

from uptrain.checkpoint.download import has_weights, is_offline, missing_weights, refuse_missing
from uptrain.checkpoint.header import ITEM_BITS, TensorInfo
from uptrain.checkpoint.reader import Checkpoint, open_checkpoint, read_config
from uptrain.checkpoint.source import Source, hub_errors, resolve
from uptrain.errors import CheckpointError


def open_headers(model: str, revision: str | None = None, allow_pickle: bool = False) -> tuple[Source, Checkpoint]:
    """Find `model` and open all that is known without its weights; a Hub model's tensors can't be read then.

    Raises:
        UptrainError: it can't be found, reached or understood.
    """
    source = resolve(model, revision, allow_pickle, weights=False)
    if source.origin != "hub" or has_weights(source.path, source.listed, allow_pickle):
        return source, open_checkpoint(source.path, allow_pickle)
    config = read_config(source.path)
    if is_offline():
        refuse_missing(model, missing_weights(source.path, source.listed, allow_pickle))
    return source, Checkpoint(source.path, config, _remote_tensors(source), remote=True)


def _remote_tensors(source: Source) -> dict[str, TensorInfo]:
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    with hub_errors(source.name, source.revision):
        try:
            found = get_safetensors_metadata(source.name, revision=source.revision)
        except NotASafetensorsRepoError:
            raise CheckpointError(
                f"{source.name} has no safetensors weights on the Hub.",
                "Convert it without --dry-run and with --allow-pickle, if you trust it.",
            ) from None
        except SafetensorsParsingError as error:
            raise CheckpointError(f"{source.name}: {error}") from None
    out: dict[str, TensorInfo] = {}
    for file, metadata in sorted(found.files_metadata.items()):
        for name, info in sorted(metadata.tensors.items(), key=lambda item: item[1].data_offsets):
            if info.dtype not in ITEM_BITS:
                raise CheckpointError(f"{source.name}: tensor {name} has dtype {info.dtype}, which uptrain can't read.")
            out[name] = TensorInfo(name, info.dtype, tuple(info.shape), file, *info.data_offsets)
    return out
