"""What a model passes to its layers on each block of text, kept in little memory: masks, rotary tables, positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """What the model passes to a decoder layer besides the hidden states: masks, rotary tables, positions."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class BlockCall:
    """What the model passes to a decoder layer on one block.

    - `positions`: (T,) int64, of its tokens.
    - `by_kind`: returns what the model passes, by attention implementation ("eager", "sdpa").
    """

    positions: Tensor
    by_kind: Callable[[str], Call]


@dataclass(frozen=True)
class _Gathered:
    """A tensor whose rows along `dim` are those of `rows`, at a block's positions."""

    rows: Tensor
    dim: int

    def tensor(self, positions: Tensor) -> Tensor:
        return self.rows.index_select(self.dim, positions.to(self.rows.device))


@dataclass(frozen=True)
class _TwoValued:
    """A tensor of two values, such as a mask: one bit an element, and the values of bits 0 and 1."""

    bits: bytes
    shape: torch.Size
    values: Tensor

    def tensor(self, positions: Tensor) -> Tensor:
        bits = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.shape.numel())
        ones = torch.from_numpy(bits).view(torch.bool).view(self.shape).to(self.values.device)
        # A mask's own bits are the mask, without a pass over it.
        return ones if self.values.dtype == torch.bool else torch.where(ones, self.values[1], self.values[0])


@dataclass
class LayerCalls:
    """What a model passes to each of its layers, recorded once for every way in which documents lie in a block.

    Where a block is one document, its calls are kept as they are. Of other blocks, tables are kept as rows of those,
    and masks as bits; a mask of all layers, and of both implementations of attention, is kept once.

    - `positions`: (n, T) int64, of each block's tokens.
    """

    positions: Tensor
    _straight: dict[tuple[str, int], Call] = field(default_factory=dict)
    _begun: dict[tuple[str, int], Call] = field(default_factory=dict)
    _packed: dict[tuple[str, int, bytes], Call] = field(default_factory=dict)
    _bits: dict[bytes, bytes] = field(default_factory=dict)
    _layouts: set[bytes] = field(default_factory=set)

    def is_straight(self, block: int) -> bool:
        """Return whether a block is one document."""
        return bool((self.positions[block].diff() == 1).all())

    def has(self, block: int) -> bool:
        """Return whether what is passed on a block of this layout is recorded."""
        return self._layout(block) in self._layouts

    def record(self, block: int | None, kind: str, calls: Mapping[int, Call]) -> None:
        """Take in what was passed to the layers.

        - `block`: the block's number, None for a block that is one document, which is recorded first.
        - `kind`: the implementation of attention.
        - `calls`: what was passed, by layer.
        """
        if block is None:
            self._straight |= {(kind, layer): call for layer, call in calls.items()}
            return
        seen: dict[int, Any] = {}
        layout = self._layout(block)
        self._layouts.add(layout)
        for layer, call in calls.items():
            plain, pack = self._straight[kind, layer], _Packer(self.positions[block], seen, self._bits)
            args = tuple(pack(value, like) for value, like in zip(call.args, plain.args, strict=True))
            kwargs = {name: pack(value, plain.kwargs.get(name)) for name, value in call.kwargs.items()}
            self._packed[kind, layer, layout] = Call(args, kwargs)

    @property
    def beginning(self) -> int:
        """Return how many tokens the beginning of a block has, half of it."""
        return -(-self.positions.shape[-1] // 2)

    def record_beginning(self, kind: str, calls: Mapping[int, Call]) -> None:
        """Take in what was passed to the layers on the beginning of a block that is one document."""
        self._begun |= {(kind, layer): call for layer, call in calls.items()}

    def on_beginning(self, layer: int, block: int) -> BlockCall:
        """Return what is passed to a layer on a block's beginning; on all of a block of several documents."""
        if not self.is_straight(block):
            return self.on(layer, block)
        return BlockCall(self.positions[block, : self.beginning], lambda kind: self._begun[kind, layer])

    def on(self, layer: int, block: int) -> BlockCall:
        """Return what is passed to a layer on a block."""
        positions = self.positions[block]
        if self.is_straight(block):
            return BlockCall(positions, lambda kind: self._straight[kind, layer])
        layout = self._layout(block)

        def by_kind(kind: str) -> Call:
            packed = self._packed[kind, layer, layout]
            args = tuple(_unpacked(value, positions) for value in packed.args)
            return Call(args, {name: _unpacked(value, positions) for name, value in packed.kwargs.items()})

        return BlockCall(positions, by_kind)

    def _layout(self, block: int) -> bytes:
        return (self.positions[block] == 0).numpy().tobytes()


@dataclass(frozen=True)
class _Packer:
    """Packs values of one block's calls.

    - `positions`: (T,) int64.
    - `seen`: what was packed already of this block, by identity; it keeps the values, so that identities stay theirs.
    - `bits`: the bits of all masks, by themselves, so that equal ones are one object.
    """

    positions: Tensor
    seen: dict[int, Any]
    bits: dict[bytes, bytes]

    def __call__(self, value: Any, like: Any) -> Any:
        """Return a value in little memory; `like` is the same value of a block that is one document."""
        if isinstance(value, (tuple, list)):
            others = like if isinstance(like, (tuple, list)) and len(like) == len(value) else [None] * len(value)
            return type(value)(self(part, other) for part, other in zip(value, others, strict=True))
        if isinstance(value, dict):
            named = like if isinstance(like, dict) else {}
            return {name: self(part, named.get(name)) for name, part in value.items()}
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.seen:
            self.seen[id(value)] = value, self._tensor(value, like)
        return self.seen[id(value)][1]

    def _tensor(self, value: Tensor, like: Any) -> Any:
        if isinstance(like, Tensor) and like.shape == value.shape and like.dtype == value.dtype:
            if torch.equal(value, like):
                return like
            for dim in (dim for dim, size in enumerate(value.shape) if size == len(self.positions)):
                gathered = _Gathered(like, dim)
                if torch.equal(value, gathered.tensor(self.positions)):
                    return gathered
        return self._two_valued(value)

    def _two_valued(self, value: Tensor) -> Any:
        low, high = value.min(), value.max()
        ones = value if value.dtype == torch.bool else value == high
        if not (ones | (value == low)).all():
            return value
        bits = np.packbits(ones.cpu().numpy()).tobytes()
        return _TwoValued(self.bits.setdefault(bits, bits), value.shape, torch.stack([low, high]))


def _unpacked(value: Any, positions: Tensor) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_unpacked(part, positions) for part in value)
    if isinstance(value, dict):
        return {name: _unpacked(part, positions) for name, part in value.items()}
    return value.tensor(positions) if isinstance(value, (_Gathered, _TwoValued)) else value
