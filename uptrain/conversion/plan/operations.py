"""Operations: how each tensor of the result is made from the source. One object per output tensor, made by the plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from uptrain.checkpoint.dtypes import Array, as_float32, cast, raw_bytes
from uptrain.checkpoint.header import TensorInfo
from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.reflink import Span
from uptrain.conversion.plan.rewrites import folded_bias, folded_weight
from uptrain.methods.method import PoolNorm


class Inputs(Protocol):
    """What an operation reads from when it is computed."""

    def read(self, name: str) -> Array:
        """Return source tensor `name` in its own shape and dtype; in float32 where calibration changed it."""

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of source tensor `name`, a few MiB at a time; each view is valid until the next."""

    def attention(self, layer: int, module: str) -> Array:
        """Return one tensor of a changed attention layer, in the result's shape and dtype."""


@dataclass(frozen=True, kw_only=True)
class Operation(ABC):
    """How one tensor of the result is made.

    - `output`: its name, dtype and shape in the result; it has no file yet.
    - `sources`: the source tensors that it is made from. It is written where the first of them stands.
    """

    output: TensorInfo
    sources: tuple[str, ...]

    changes: ClassVar[bool] = True
    """Whether the result differs from its source by more than rounding to another dtype."""
    unchanged: ClassVar[bool] = False
    """Whether the bytes are just those of the source."""
    needs_floats: ClassVar[bool] = False
    """Whether the source must hold floating-point values."""
    checks_values: ClassVar[bool] = False
    """Whether NaN and infinity are refused where the values are made, and not when they are written."""

    @property
    def source(self) -> str:
        """Return the source tensor in whose place the output is written."""
        return self.sources[0]

    @property
    def memory(self) -> int:
        """Return the bytes of whole tensors that are held in memory meanwhile, beyond the usual buffers."""
        return 0

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return, as JSON values, what else decides the output's bytes: part of the plan's digest."""
        return ()

    @property
    def digest_row(self) -> tuple[Any, ...]:
        """Return, as JSON values, all that decides the output's bytes, the source's bytes and the method aside."""
        output = self.output
        return (type(self).__name__, output.name, output.dtype, output.shape, self.sources, *self.settings)

    @abstractmethod
    def compute(self, inputs: Inputs) -> Array:
        """Return the values in the output's shape and any dtype."""

    def chunks(self, inputs: Inputs) -> Iterator[memoryview]:
        """Yield the output's bytes.

        Raises:
            UptrainError: a finite value is too large for the output's dtype.
        """
        yield raw_bytes(np.ascontiguousarray(cast(self.compute(inputs), self.output.dtype, self.source)))


@dataclass(frozen=True, kw_only=True)
class Copy(Operation):
    """The source's bytes, under the name in the result. They are streamed, or share blocks with the source's file."""

    changes = False
    unchanged = True

    def compute(self, inputs: Inputs) -> Array:
        """Return the source's values."""
        return inputs.read(self.source)

    def chunks(self, inputs: Inputs) -> Iterator[memoryview]:
        """Yield the source's bytes."""
        return inputs.chunks(self.source)


@dataclass(frozen=True, kw_only=True)
class Cast(Operation):
    """The source's values in another dtype."""

    changes = False

    def compute(self, inputs: Inputs) -> Array:
        """Return the source's values."""
        return inputs.read(self.source)


@dataclass(frozen=True, kw_only=True)
class Repair(Operation):
    """The source's values, or what calibration made of them: the bytes of the source where it changed nothing."""

    @property
    def memory(self) -> int:
        """Return the bytes of the tensor in its own dtype and in float32."""
        return 4 * self.output.nbytes

    def compute(self, inputs: Inputs) -> Array:
        """Return the values."""
        return inputs.read(self.source)


@dataclass(frozen=True, kw_only=True)
class Transpose(Operation):
    """A matrix (in, out) as (out, in), or the reverse."""

    def compute(self, inputs: Inputs) -> Array:
        """Return the transposed matrix."""
        return inputs.read(self.source).T


@dataclass(frozen=True, kw_only=True)
class Scale(Operation):
    """The source's values times `factor`, in float32."""

    factor: float
    needs_floats = True

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return the factor."""
        return (self.factor,)

    def compute(self, inputs: Inputs) -> Array:
        """Return the product in float32."""
        return as_float32(inputs.read(self.source)) * np.float32(self.factor)


@dataclass(frozen=True, kw_only=True)
class Shift(Operation):
    """The source's values plus `addend`, in float32."""

    addend: float
    needs_floats = True

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return the addend."""
        return (self.addend,)

    def compute(self, inputs: Inputs) -> Array:
        """Return the sum in float32."""
        return as_float32(inputs.read(self.source)) + np.float32(self.addend)


@dataclass(frozen=True, kw_only=True)
class Constant(Operation):
    """A tensor that has `value` everywhere."""

    value: float

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return the value."""
        return (self.value,)

    def compute(self, inputs: Inputs) -> Array:
        """Return the values in float32."""
        return np.full(self.output.shape, self.value, np.float32)


@dataclass(frozen=True, kw_only=True)
class PoolKeyNorm(Operation):
    """A key norm's weight, pooled as the method pools the heads.

    - `heads`, `groups`: how many heads `sources` have together, and how many the output has.
    - `pool`: the method's function; the plan's digest covers it by the method's name.
    """

    heads: int
    groups: int
    pool: PoolNorm
    needs_floats = True

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return the heads and groups."""
        return self.heads, self.groups

    def compute(self, inputs: Inputs) -> Array:
        """Return the pooled weight, (groups · head_dim,) or (groups, head_dim)."""
        weight = np.concatenate([inputs.read(name) for name in self.sources])
        pooled: Array = self.pool(weight, self.heads, self.groups)
        return pooled


@dataclass(frozen=True, kw_only=True)
class FoldNorm(Operation):
    """A linear's weight or bias, after the weight or the bias of the norm before it was moved into it."""

    needs_floats = True

    @property
    def memory(self) -> int:
        """Return the bytes of the linear in its own dtype and in float32."""
        return 4 * self.output.nbytes


@dataclass(frozen=True, kw_only=True)
class FoldNormWeight(FoldNorm):
    """A linear's weight times the norm's weight; `sources` are the linear's weight and the norm's."""

    def compute(self, inputs: Inputs) -> Array:
        """Return the weight (out, in) in float32."""
        weight, scale = map(inputs.read, self.sources)
        return folded_weight(weight, scale)


@dataclass(frozen=True, kw_only=True)
class FoldNormBias(FoldNorm):
    """A linear's bias that also stands for the norm's bias.

    `sources` are the linear's weight, the norm's bias and, where the linear has one, its own bias.
    """

    def compute(self, inputs: Inputs) -> Array:
        """Return the bias (out,) in float32."""
        weight, shift, *own = map(inputs.read, self.sources)
        return folded_bias(weight, own[0] if own else None, shift)


@dataclass(frozen=True, kw_only=True)
class AttentionPart(Operation):
    """One tensor of a changed attention layer, which the request's method makes as a whole.

    - `layer`: the layer's number.
    - `module`: the tensor's name in the attention, such as "c_attn.weight".
    """

    layer: int
    module: str
    checks_values = True

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return the layer and module."""
        return self.layer, self.module

    def compute(self, inputs: Inputs) -> Array:
        """Return the tensor, in the output's dtype already."""
        return inputs.attention(self.layer, self.module)


def new_info(name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    """Return the header of a tensor that is in no file yet."""
    return TensorInfo(name, dtype, shape, "", -1, -1)


def copy_or_cast(output: TensorInfo, source: TensorInfo) -> Operation:
    """Return what keeps the source's values: a copy, or a cast where the dtype changes."""
    kind = Copy if output.dtype == source.dtype else Cast
    return kind(output=output, sources=(source.name,))


def unchanged_spans(operations: Iterable[Operation], checkpoint: Checkpoint) -> dict[str, Span]:
    """Map each output whose bytes stand as they are in a file of the source to where they stand."""
    found = {each.output.name: checkpoint.span(each.source) for each in operations if each.unchanged}
    return {name: span for name, span in found.items() if span is not None}
