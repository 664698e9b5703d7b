"""Check the files that transformers is about to load: it must load those that uptrain would convert."""

from __future__ import annotations

from pathlib import Path

from uptrain.checkpoint.jsonfile import read_json
from uptrain.checkpoint.reader import Checkpoint, check_files, open_checkpoint, read_config
from uptrain.checkpoint.weight_files import files_of, find_weights, names_in, read_weight_map
from uptrain.errors import CheckpointError


def open_loadable(path: Path, allow_pickle: bool) -> Checkpoint | None:
    """Return the checkpoint in folder `path`, opened; None where its weights are pickles.

    Only transformers reads pickles, with weights_only=True unless an option says otherwise.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    config, opened = read_config(path), None
    weights = find_weights(names_in(path, config), config, path, allow_pickle)
    if weights.pickled:
        # Opening pickles here would read them twice.
        check_files(path, weights, files_of(weights, read_weight_map(path, weights)))
    else:
        opened = open_checkpoint(path)
    if weights.indexed and not isinstance(read_json(path / weights.file).get("metadata"), dict):
        raise CheckpointError(
            f"{path / weights.file} has no metadata, without which transformers can't read it.",
            'Add "metadata": {} to it, or download it again.',
        )
    return opened
