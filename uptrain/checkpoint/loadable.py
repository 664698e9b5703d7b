"""Check the files that transformers is about to load, so that it loads those that uptrain would convert."""

from __future__ import annotations

from pathlib import Path

from uptrain.checkpoint.jsonfile import read_json
from uptrain.checkpoint.reader import check_files, open_checkpoint, read_config
from uptrain.checkpoint.weight_files import files_of, find_weights, names_in, read_weight_map
from uptrain.errors import CheckpointError


def uses_safetensors(path: Path, allow_pickle: bool) -> bool:
    """Return what to give transformers' `from_pretrained` as `use_safetensors` for the checkpoint in folder `path`.

    False means pickled weights, which it reads with weights_only=True unless told otherwise.

    Raises:
        CheckpointError: as `open_checkpoint`; pickles are unpickled only by transformers.
    """
    config = read_config(path)
    weights = find_weights(names_in(path, config), config, path, allow_pickle)
    if weights.pickled:
        # To look into them would be to read them twice.
        check_files(path, weights, files_of(weights, read_weight_map(path, weights)))
    else:
        open_checkpoint(path)
    if weights.indexed and not isinstance(read_json(path / weights.file).get("metadata"), dict):
        raise CheckpointError(
            f"{path / weights.file} has no metadata, without which transformers can't read it.",
            'Add "metadata": {} to it, or download it again.',
        )
    return not weights.pickled
