"""Each operation computes what its name says, and no two operations that give other bytes have one digest row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from uptrain.checkpoint.dtypes import Array, raw_bytes
from uptrain.conversion.plan.operations import (
    AttentionPart,
    Cast,
    Constant,
    Copy,
    FoldNormBias,
    FoldNormWeight,
    Operation,
    PoolKeyNorm,
    Scale,
    Shift,
    Transpose,
    copy_or_cast,
    new_info,
)
from uptrain.methods.registry import METHODS

RANDOM = np.random.default_rng(0)
WEIGHT, BIAS = RANDOM.normal(size=(6, 4)).astype(np.float32), RANDOM.normal(size=6).astype(np.float32)
NORM, SHIFT = RANDOM.normal(size=4).astype(np.float32), RANDOM.normal(size=4).astype(np.float32)


class Tensors:
    """Source tensors in memory."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self.tensors = tensors

    def read(self, name: str) -> Array:
        return self.tensors[name]

    def chunks(self, name: str) -> Iterator[memoryview]:
        yield raw_bytes(self.tensors[name])

    def attention(self, layer: int, module: str) -> Array:
        return self.tensors[f"{layer}.{module}"]


INPUTS = Tensors({"w": WEIGHT, "b": BIAS, "n": NORM, "s": SHIFT, "0.q": WEIGHT})


def bytes_of(operation: Operation) -> bytes:
    return b"".join(bytes(chunk) for chunk in operation.chunks(INPUTS))


def operations() -> dict[str, tuple[Operation, Array]]:
    """Every kind of operation, and what it has to give."""
    matrix, pool = new_info("out", "F32", (6, 4)), METHODS["mean"].pool_norm
    assert pool is not None
    return {
        "copy": (Copy(output=matrix, sources=("w",)), WEIGHT),
        "cast": (Cast(output=new_info("out", "F64", (6, 4)), sources=("w",)), WEIGHT.astype(np.float64)),
        "transpose": (Transpose(output=new_info("out", "F32", (4, 6)), sources=("w",)), WEIGHT.T),
        "scale": (Scale(output=matrix, sources=("w",), factor=0.5), WEIGHT / 2),
        "shift": (Shift(output=matrix, sources=("w",), addend=-1.0), WEIGHT - 1),
        "constant": (Constant(output=new_info("out", "F32", (3,)), sources=("w",), value=2), np.full(3, 2, np.float32)),
        "attention": (AttentionPart(output=matrix, sources=("w",), layer=0, module="q"), WEIGHT),
        "pool": (
            PoolKeyNorm(output=new_info("out", "F32", (2,)), sources=("n",), heads=2, groups=1, pool=pool),
            (NORM[:2] + NORM[2:]) / 2,
        ),
    }


@pytest.mark.parametrize("kind", operations())
def test_an_operation_gives_the_bytes_of_its_definition(kind: str) -> None:
    operation, wanted = operations()[kind]
    assert operation.output.nbytes == wanted.nbytes
    assert bytes_of(operation) == np.ascontiguousarray(wanted).tobytes()


@pytest.mark.parametrize("own", [(), ("b",)], ids=["without a bias", "with a bias"])
def test_a_folded_norm_leaves_what_the_linear_computes(own: tuple[str, ...]) -> None:
    """The oracle is torch's linear after an affine map of its input."""
    weight = FoldNormWeight(output=new_info("out", "F32", (6, 4)), sources=("w", "n"))
    bias = FoldNormBias(output=new_info("out", "F32", (6,)), sources=("w", "s", *own))
    x = torch.randn(5, 4)
    before = torch.nn.functional.linear(
        x * torch.tensor(NORM) + torch.tensor(SHIFT), torch.tensor(WEIGHT), torch.tensor(BIAS) if own else None
    )
    found = [torch.tensor(operation.compute(INPUTS)) for operation in (weight, bias)]
    torch.testing.assert_close(torch.nn.functional.linear(x, *found), before)


def test_only_a_copy_is_streamed_and_counted_as_unchanged() -> None:
    found = {kind: operation for kind, (operation, _) in operations().items()}
    assert [kind for kind, operation in found.items() if operation.unchanged] == ["copy"]
    assert [kind for kind, operation in found.items() if not operation.changes] == ["copy", "cast"]
    same, other = (copy_or_cast(new_info("out", dtype, (1,)), new_info("w", "F32", (1,))) for dtype in ("F32", "F16"))
    assert (type(same), type(other)) == (Copy, Cast) and same.sources == other.sources == ("w",)


def test_what_gives_other_bytes_has_another_digest_row() -> None:
    matrix = new_info("out", "F32", (6, 4))
    scale, part = (operations()[kind][0] for kind in ("scale", "attention"))
    rows = [operation.digest_row for operation, _ in operations().values()]
    rows += [
        replace(scale, factor=0.25).digest_row,  # type: ignore[call-arg]
        replace(scale, sources=("b",)).digest_row,
        replace(scale, output=replace(matrix, name="other")).digest_row,
        replace(scale, output=replace(matrix, dtype="F16")).digest_row,
        replace(part, layer=1).digest_row,  # type: ignore[call-arg]
        Shift(output=matrix, sources=("w",), addend=0.5).digest_row,
        FoldNormWeight(output=matrix, sources=("w", "n")).digest_row,
        FoldNormBias(output=matrix, sources=("w", "n")).digest_row,
    ]
    assert len(rows) == len(set(rows))
