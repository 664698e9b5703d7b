"""What the operations of one shard read: the source's tensors, and changed attention layers, each made once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from uptrain.checkpoint.checksum import FollowingChecksum
from uptrain.checkpoint.dtypes import Array
from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.malloc import give_back
from uptrain.conversion.run.layers import LayerMaker


class ShardInputs:
    """What the operations of one shard read, in the order of the shard.

    - `checkpoint`: the open source.
    - `layers`: makes the changed attention layers.
    - `room`: is held while a layer is made, so that few are made at a time.
    - `follower`: digests the source file that the shard is made from, on the way; None where there is no such file.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: LayerMaker,
        room: AbstractContextManager[Any],
        follower: FollowingChecksum | None,
    ) -> None:
        self._checkpoint, self._layers, self._room, self._follower = checkpoint, layers, room, follower
        self._made: dict[int, dict[str, Array]] = {}

    def read(self, name: str) -> Array:
        """Return source tensor `name` in its own shape and dtype; in float32 where calibration changed it."""
        return self._layers.read(name)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of source tensor `name`, a few MiB at a time; each view is valid until the next."""
        chunks = self._checkpoint.chunks(name)
        if self._follower is None:
            return chunks
        return self._follower.follow(self._checkpoint.tensors[name].start, chunks)

    def attention(self, layer: int, module: str) -> Array:
        """Return one tensor of a changed attention layer, once: the layer is made with its first tensor.

        Raises:
            CheckpointError: the source's values in this layer are not finite.
        """
        if layer not in self._made:
            self._made.clear()
            with self._room:
                give_back()
                self._made[layer] = self._layers.make(layer)
        return self._made[layer].pop(module)
