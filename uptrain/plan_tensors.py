"""What a tensor of the result is, and what it is made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from uptrain.checkpoint.header import TensorInfo

if TYPE_CHECKING:
    from uptrain.plan_norms import PooledNorm

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
