"""Token blocks to batches: the targets, and the positions that separate packed documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uptrain.data.boundary import Boundary, positions_of
from uptrain.training.losses import IGNORED


@dataclass(frozen=True)
class Batch:
    """Sequences to train on; each tensor is (sequences, tokens) int64.

    - `ids`: the tokens.
    - `targets`: the token that each position predicts, or IGNORED.
    - `position_ids`: positions that start at 0 in each document, which keeps attention inside documents in
      transformers' classes. None where each sequence is one document, so that the fastest causal attention is used.
    """

    ids: Tensor
    targets: Tensor
    position_ids: Tensor | None

    def share(self, process: int, processes: int, micro_batches: int) -> list[Batch]:
        """Return this process's sequences as micro-batches.

        - `process`: the index of this process.
        - `processes`: the number of processes.
        - `micro_batches`: the number of micro-batches per process.
        """
        return [self.rows(some) for some in torch.arange(len(self.ids))[process::processes].chunk(micro_batches)]

    def rows(self, some: slice | Tensor) -> Batch:
        """Return the sequences that a slice or an index tensor selects."""
        positions = None if self.position_ids is None else self.position_ids[some]
        return Batch(self.ids[some], self.targets[some], positions)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        positions = None if self.position_ids is None else self.position_ids.to(device)
        return Batch(self.ids.to(device), self.targets.to(device), positions)

    @property
    def target_tokens(self) -> int:
        """Return the number of tokens with a target."""
        return int((self.targets != IGNORED).sum())


def batch_of(blocks: NDArray[np.integer[Any]], boundary: Boundary | None, has_encoder: bool = False) -> Batch:
    """Return blocks as a batch for next-token prediction.

    - `blocks`: (sequences, tokens), integers.
    - `boundary`: the token between documents that are kept apart; None for attention over the whole block.
    - `has_encoder`: whether an encoder reads the first half of each block. Then only the second half has targets.
    """
    ids = torch.from_numpy(np.ascontiguousarray(blocks, dtype=np.int64))
    targets = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), IGNORED)], dim=1)
    if has_encoder:
        targets[:, : ids.shape[1] // 2 - 1] = IGNORED
    if boundary is None:
        return Batch(ids, targets, None)
    starts = boundary.starts(ids.numpy())
    if not starts.any():
        return Batch(ids, targets, None)
    # The first token of a document is not predicted from the document before it.
    targets[:, :-1][torch.from_numpy(starts[:, 1:])] = IGNORED
    return Batch(ids, targets, torch.from_numpy(positions_of(starts)))
