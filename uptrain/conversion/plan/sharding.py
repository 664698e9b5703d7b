"""Group a plan's tensors into shard files."""

from __future__ import annotations

from uptrain.checkpoint.dtypes import is_float
from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.plan.operations import Operation
from uptrain.errors import CheckpointError


def into_shards(operations: list[Operation], checkpoint: Checkpoint, limit: int | None) -> dict[str, list[Operation]]:
    """Group operations by the shard file that gets their outputs.

    - `operations`: in the order in which their outputs are written.
    - `checkpoint`: the open source, by whose files they are grouped where `limit` is None.
    - `limit`: bytes per shard, within which consecutive outputs share a file.

    Raises:
        CheckpointError: two outputs have one name, or an operation on values would get something else.
    """
    _check_outputs(operations, checkpoint)
    groups: list[list[Operation]] = []
    if limit is None:
        by_file: dict[str, list[Operation]] = {name: [] for name in checkpoint.files}
        for operation in operations:
            by_file[checkpoint.tensors[operation.source].file].append(operation)
        groups = [group for group in by_file.values() if group]
    else:
        size = 0
        for operation in operations:
            if not groups or size + operation.output.nbytes > limit:
                groups.append([])
                size = 0
            groups[-1].append(operation)
            size += operation.output.nbytes
    return dict(zip(_shard_names(len(groups)), groups, strict=True))


def _check_outputs(operations: list[Operation], checkpoint: Checkpoint) -> None:
    seen: set[str] = set()
    for operation in operations:
        if operation.output.name in seen:
            raise CheckpointError(f"Two tensors of the source would both become {operation.output.name}.")
        seen.add(operation.output.name)
        source = checkpoint.tensors[operation.source]
        if operation.needs_floats and not is_float(source.dtype):
            raise CheckpointError(f"Tensor {source.name} is {source.dtype}, where floating values are needed.")


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
