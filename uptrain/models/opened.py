"""Open a model's checkpoint once, before its weights are loaded: the checks and the loading take what was opened."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from uptrain.architectures.quantization import Quantization, find_quantization
from uptrain.checkpoint.loadable import open_loadable
from uptrain.checkpoint.reader import Checkpoint, open_checkpoint, read_config
from uptrain.checkpoint.source import Source
from uptrain.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model whose config and headers were read. No weights are in memory.

    - `source`: where the model is.
    - `config`: what its config.json holds.
    - `checkpoint`: the opened weights; None where only transformers reads them.
    """

    source: Source
    config: dict[str, Any]
    checkpoint: Checkpoint | None

    @property
    def name(self) -> str:
        """Return what the user called the model."""
        return self.source.name

    @cached_property
    def quantization(self) -> Quantization | None:
        """Return how the weights are quantized; None where they are not. Without `checkpoint`, only configs are read.

        Raises:
            CheckpointError: a quantize_config.json or the like that can't be read.
        """
        tensors = {} if self.checkpoint is None else self.checkpoint.tensors
        return find_quantization(self.config, tensors, self.source.path)


def open_model(source: Source) -> OpenedModel:
    """Open a model's checkpoint, and check that its weights can be read.

    Raises:
        CheckpointError: weights are missing or damaged, or they are pickles, and `source` does not permit them.
    """
    found = open_loadable(source.path, source.allow_pickle)
    return OpenedModel(source=source, config=found.config, checkpoint=found.checkpoint)


def open_config(source: Source) -> OpenedModel:
    """Open a model of which transformers reads other weight files than the default ones, such as a variant.

    Raises:
        CheckpointError: config.json is missing or broken.
    """
    checkpoint = None
    with suppress(CheckpointError):
        checkpoint = open_checkpoint(source.path)
    config = read_config(source.path) if checkpoint is None else checkpoint.config
    return OpenedModel(source=source, config=config, checkpoint=checkpoint)
