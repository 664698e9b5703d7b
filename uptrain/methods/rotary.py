"""Rotated keys as complex numbers: a rotation is a phase, and one complex factor per pair commutes with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Pairing = Literal["half", "interleaved"]


@dataclass(frozen=True)
class Rotary:
    """Which of a head's dims are rotated, and how they pair up.

    - `pairing`: `half` pairs dim j with j + dims/2 (Llama, NeoX, Phi); `interleaved` pairs 2j with 2j + 1 (GPT-J,
      Cohere, GLM).
    - `dims`: how many dims are rotated, the first ones; the others, in partial-rotary models, see no position.

    Source: Su et al. 2021, RoFormer, section 3.2.2.
    """

    pairing: Pairing
    dims: int

    @property
    def pairs(self) -> int:
        """Count the pairs, dims/2."""
        return self.dims // 2

    def indices(self) -> tuple[Tensor, Tensor]:
        """Return the dims of the real and of the imaginary parts, each (dims/2,) int64."""
        if self.pairing == "half":
            return torch.arange(self.pairs), torch.arange(self.pairs, self.dims)
        return torch.arange(0, self.dims, 2), torch.arange(1, self.dims, 2)


def to_complex(rows: Tensor, rotary: Rotary) -> Tensor:
    """View rotated rows (…, D, d̃) as (…, dims/2, d̃) complex; unrotated rows are left out."""
    real, imaginary = rotary.indices()
    return torch.complex(rows[..., real, :].contiguous(), rows[..., imaginary, :].contiguous())


def set_complex(rows: Tensor, rotary: Rotary, pairs: Tensor) -> Tensor:
    """Return `rows` (…, D, d̃) with the rotated ones replaced by `pairs` (…, dims/2, d̃) complex."""
    real, imaginary = rotary.indices()
    result = rows.clone()
    result[..., real, :] = pairs.real
    result[..., imaginary, :] = pairs.imag
    return result


def apply_factor(rows: Tensor, rotary: Rotary, factors: Tensor) -> Tensor:
    """Multiply each head's pairs by its complex factors; rows (heads, D, d̃), factors (heads, dims/2) complex.

    A rotation by θ multiplies a pair by e^{iθ}, and complex factors commute: rotating before or after gives the same.

    Source: Su et al. 2021, RoFormer, equations 12 and 34.
    """
    return set_complex(rows, rotary, to_complex(rows, rotary) * factors[..., None])


def pair_means(energy: Tensor, rotary: Rotary) -> Tensor:
    """Return each pair's mean energy, (…, dims/2), from a diagonal or per-dim energy (…, D)."""
    real, imaginary = rotary.indices()
    return (energy[..., real] + energy[..., imaginary]) / 2
