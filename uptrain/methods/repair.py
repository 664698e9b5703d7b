"""Repair a converted layer on calibration text: refit its output projection in closed form, then gradient steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from uptrain.methods.heads import HeadMaps
from uptrain.methods.latent import LatentMaps

Maps = TypeVar("Maps", HeadMaps, LatentMaps)

WARMUP = 5
"""Gradient steps over which the learning rate rises."""


class Regression:
    """Weighted normal equations of targets (T, d) on features (T, n), in float64, for several targets at once."""

    def __init__(self, features: int, outputs: int, targets: Sequence[str]) -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64)
        self.products = {name: torch.zeros(features, outputs, dtype=torch.float64) for name in targets}

    def add(self, features: Tensor, weights: Tensor, targets: dict[str, Tensor]) -> None:
        """Take in a block: features (T, n), weights (T,) ≥ 0, targets (T, d) by name, all float32."""
        weighted = features * weights[:, None]
        self.gram += (weighted.mT @ features).double().cpu()
        for name, target in targets.items():
            self.products[name] += (weighted.mT @ target).double().cpu()


def ridge(gram: Tensor, product: Tensor, start: Tensor, damping: float) -> Tensor:
    """Return the W (n, d) that minimises ‖C W − T‖² + λ‖W − W₀‖², from CᵀC (n, n), CᵀT (n, d), W₀ (n, d).

    λ is `damping` × the mean diagonal of CᵀC.
    Source: Hoerl and Kennard 1970, Ridge Regression, equation 2.1, shrunk towards W₀ instead of zero.
    """
    # Features that are zero throughout say nothing, and keep the start.
    level = damping * float(gram.diagonal().mean()) or 1.0
    regular = gram + level * torch.eye(len(gram), dtype=gram.dtype)
    solution: Tensor = torch.linalg.solve(regular, product + level * start)
    return solution


def residual(gram: Tensor, product: Tensor, solution: Tensor) -> float:
    """Return ‖C W − T‖² less the constant ‖T‖², from CᵀC, CᵀT and W."""
    return float((solution * (gram @ solution - 2 * product)).sum())


def best_ridge(fit: Regression, check: Regression, target: str, start: Tensor, dampings: Sequence[float]) -> float:
    """Return the damping whose refit on `fit` errs least on `check`."""

    def error(damping: float) -> float:
        solution = ridge(fit.gram, fit.products[target], start, damping)
        return residual(check.gram, check.products[target], solution)

    return min(dampings, key=error)


def gradient_steps(
    maps: Maps, loss: Callable[[Maps, int], Tensor], batches: int, steps: int, rate: float, seed: int
) -> Maps:
    """Return a frozen dataclass of float32 maps after `steps` Adam steps on `loss(maps, batch)`, in a seeded order.

    Each tensor's learning rate is `rate` × its own root mean square, with a short warm-up and a cosine decay.
    Source: Kingma and Ba 2015, Adam, algorithm 1.
    """
    trained = {
        name: value.detach().float().clone().requires_grad_(True)
        for name, value in vars(maps).items()
        if value is not None and value.numel()
    }
    scales = [rate * max(float(value.detach().square().mean().sqrt()), 1e-8) for value in trained.values()]
    optimizer = torch.optim.Adam(
        [{"params": [value], "lr": scale} for value, scale in zip(trained.values(), scales, strict=True)],
        betas=(0.9, 0.95),
    )
    current = replace(maps, **trained)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        if not order:
            order = torch.randperm(batches, generator=generator).tolist()
        share = min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = scale * share
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(current, order.pop()).backward()
        optimizer.step()
    return replace(maps, **{name: value.detach() for name, value in trained.items()})
