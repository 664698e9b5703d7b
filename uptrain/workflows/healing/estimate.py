"""What healing takes, before it begins: bytes of memory, and seconds by the speed of a matrix product."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from uptrain.conversion.plan.planner import Plan
from uptrain.training.recipe import Recipe

STUDENT, TEACHER = 16, 4
"""Bytes per parameter: fp32 weights, gradients and Adam's two moments of the student; fp32 weights of the teacher."""
PASSES = 4
"""Forward passes that a token costs: the teacher's, the student's, and a backward pass that is worth two."""
SHARE = 0.5
"""The speed of training relative to that of one large matrix product, as measured on CPUs."""


@dataclass(frozen=True, kw_only=True)
class HealEstimate:
    """What healing will take: `memory` in bytes, of weights and the optimizer, and `seconds` of wall time."""

    memory: int
    seconds: float

    @classmethod
    def of(cls, plan: Plan, recipe: Recipe) -> HealEstimate:
        """Return the estimate for a plan's result and a recipe, on the device that will compute."""
        student = sum(math.prod(operation.output.shape) for operation in plan.operations)
        teacher = sum(math.prod(info.shape) for info in plan.source.tensors.values())
        multiplied = student * recipe.total_steps * recipe.tokens_per_step
        return cls(
            memory=STUDENT * student + TEACHER * teacher, seconds=2 * PASSES * multiplied / (SHARE * _product_speed())
        )


def _product_speed() -> float:
    """Return how many floating-point operations per second a float32 matrix product takes on the device."""
    import torch

    from uptrain.models import devices

    device, size = devices.device(), 1024
    matrix = torch.ones(size, size, device=device)
    matrix @ matrix
    began = time.monotonic()
    for _ in range(4):
        matrix = matrix @ matrix.clamp(max=1 / size)
    float(matrix[0, 0])  # waits for the device
    return 4 * 2 * size**3 / max(1e-6, time.monotonic() - began)
