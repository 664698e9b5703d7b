"""Check the files that transformers is about to load: it must load those that uptrain would convert."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uptrain.checkpoint.reader import Checkpoint, open_weights, read_config
from uptrain.checkpoint.weight_files import locate_weights
from uptrain.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class LoadableFolder:
    """A folder that transformers can load.

    - `config`: what config.json holds.
    - `checkpoint`: the opened weights; None where they are pickles, which only transformers reads.
    """

    config: dict[str, Any]
    checkpoint: Checkpoint | None


def open_loadable(path: Path, allow_pickle: bool) -> LoadableFolder:
    """Open the checkpoint in folder `path`, and check what transformers needs to load it.

    Only transformers reads pickles, with weights_only=True unless an option says otherwise.

    Raises:
        CheckpointError: as `open_checkpoint`, or the index lacks what transformers needs.
    """
    config = read_config(path)
    stored = locate_weights(path, config, allow_pickle)
    # Opening pickles here would read them twice.
    opened = None if stored.weights.pickled else open_weights(path, config, stored)
    if not stored.has_metadata:
        raise CheckpointError(
            f"{path / stored.index} has no metadata, without which transformers can't read it.",
            'Add "metadata": {} to it, or download it again.',
        )
    return LoadableFolder(config=config, checkpoint=opened)
