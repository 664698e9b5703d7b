"""Group a plan's tensors into shard files."""

from __future__ import annotations

from uptrain.checkpoint.dtypes import is_float
from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.plan.operations import OutputTensor
from uptrain.errors import CheckpointError


def into_shards(
    outputs: list[OutputTensor], checkpoint: Checkpoint, limit: int | None
) -> dict[str, list[OutputTensor]]:
    """Group the outputs by shard file: as the source is sharded, or in order up to `limit` bytes per shard.

    Raises:
        CheckpointError: two outputs have one name, or an operation on values would get something else.
    """
    _check_outputs(outputs, checkpoint)
    groups: list[list[OutputTensor]] = []
    if limit is None:
        by_file: dict[str, list[OutputTensor]] = {name: [] for name in checkpoint.files}
        for output in outputs:
            by_file[checkpoint.tensors[output.source].file].append(output)
        groups = [group for group in by_file.values() if group]
    else:
        size = 0
        for output in outputs:
            if not groups or size + output.info.nbytes > limit:
                groups.append([])
                size = 0
            groups[-1].append(output)
            size += output.info.nbytes
    return dict(zip(_shard_names(len(groups)), groups, strict=True))


def _check_outputs(outputs: list[OutputTensor], checkpoint: Checkpoint) -> None:
    seen: set[str] = set()
    for output in outputs:
        if output.info.name in seen:
            raise CheckpointError(f"Two tensors of the source would both become {output.info.name}.")
        seen.add(output.info.name)
        source = checkpoint.tensors[output.source]
        if output.operation in ("scale", "shift", "pool", "fold") and not is_float(source.dtype):
            raise CheckpointError(f"Tensor {source.name} is {source.dtype}, where floating values are needed.")


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
