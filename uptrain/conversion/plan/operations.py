"""What a tensor of the result is, and what it is made from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from uptrain.checkpoint.header import TensorInfo
from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.reflink import Span

if TYPE_CHECKING:
    from uptrain.conversion.plan.norms import PooledNorm

Operation = Literal["copy", "transpose", "scale", "shift", "pool", "fold", "constant", "attention"]


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the result: what it is, and the source tensor or layer it is made from.

    `factor` scales or shifts it, and a constant is that throughout; `fold` names the norm whose weight and bias move
    into the linear `linear`.
    """

    info: TensorInfo
    operation: Operation
    source: str
    layer: int = -1
    module: str = ""
    factor: float = 1.0
    norm: PooledNorm | None = None
    linear: str = ""
    fold: str = ""

    def unchanged(self, checkpoint: Checkpoint) -> bool:
        """Say whether its bytes are just those of its source."""
        return self.operation == "copy" and self.info.dtype == checkpoint.tensors[self.source].dtype


def unchanged_spans(tensors: Iterable[OutputTensor], checkpoint: Checkpoint) -> dict[str, Span]:
    """Map each tensor whose bytes stand as they are in a file of the source to where."""
    found = {tensor.info.name: checkpoint.span(tensor.source) for tensor in tensors if tensor.unchanged(checkpoint)}
    return {name: span for name, span in found.items() if span is not None}
