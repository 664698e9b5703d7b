"""Repair a converted layer on calibration text: refit its output projection, then take gradient steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.mla_layer import LatentMaps

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
        self.gram += (weighted.mT @ features).cpu()
        for name, target in targets.items():
            self.products[name] += (weighted.mT @ target).cpu()

    def product(self, drift: float) -> Tensor:
        """Return CᵀT (n, d) of the target `attention` + `drift` × `gap`."""
        attention = self.products["attention"]
        return attention + drift * self.products["gap"] if drift else attention


class Check:
    """Weighted features and targets that nothing is fitted to, block by block, float32 where they were computed."""

    def __init__(self) -> None:
        self._blocks: list[tuple[Tensor, dict[str, Tensor]]] = []

    def add(self, features: Tensor, weights: Tensor, targets: dict[str, Tensor]) -> None:
        """Take in a block, as `Regression.add` does."""
        root = weights.sqrt()[:, None]
        self._blocks.append((features * root, {name: target * root for name, target in targets.items()}))

    def errors(self, solutions: dict[str, Tensor], drifts: Sequence[float]) -> list[float]:
        """Return ‖C W − T‖² for each drift, W = W_attention + drift · W_gap from solutions (n, d), and T likewise."""
        found = [0.0] * len(drifts)
        for features, targets in self._blocks:
            missed = {name: features @ solution.to(features) - targets[name] for name, solution in solutions.items()}
            for index, drift in enumerate(drifts):
                wrong = missed["attention"] + drift * missed["gap"] if drift else missed["attention"]
                found[index] += float(wrong.square().sum())
        return found


def ridge(gram: Tensor, product: Tensor, start: Tensor, damping: float) -> Tensor:
    """Return the W (n, d) that minimises ‖C W − T‖² + λ‖W − W₀‖².

    - `gram`: CᵀC (n, n).
    - `product`: CᵀT (n, d).
    - `start`: W₀ (n, d).
    - `damping`: λ, relative to the mean diagonal of CᵀC.

    Source: Hoerl and Kennard 1970, Ridge Regression, equation 2.1, shrunk towards W₀ instead of zero.
    """
    regular, level = _regular(gram, damping)
    solution: Tensor = torch.linalg.solve(regular, product + level * start)
    return solution


def best_dampings(
    fit: Regression, check: Check, start: Tensor, drifts: Sequence[float], dampings: Sequence[float]
) -> list[float]:
    """Return, for each drift, the damping whose refit on `fit` errs least on `check`.

    A refit is linear in its target, so one factorisation per damping serves all drifts.

    - `fit`: the normal equations.
    - `check`: the held-out blocks.
    - `start`: (n, d), the output projection before the refit.
    - `drifts`: shares of the error so far that the refit corrects.
    - `dampings`: values of λ to try.
    """
    errors = []
    for damping in dampings:
        regular, level = _regular(fit.gram, damping)
        factors = torch.linalg.lu_factor(regular)
        del regular
        solutions = {"attention": torch.linalg.lu_solve(*factors, fit.product(0.0) + level * start)}
        if any(drifts):
            solutions["gap"] = torch.linalg.lu_solve(*factors, fit.products["gap"])
        errors.append(check.errors(solutions, drifts))
    return [min(zip(column, dampings, strict=True))[1] for column in zip(*errors, strict=True)]


def _regular(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    # Where all features are zero, the level 1 leaves the start as it is.
    level = damping * float(gram.diagonal().mean()) or 1.0
    regular = gram.clone()
    regular.diagonal().add_(level)
    return regular, level


def gradient_steps(
    maps: Maps, loss: Callable[[Maps, int], Tensor], batches: Sequence[int], steps: int, rate: float, seed: int
) -> Maps:
    """Return maps after Adam steps on `loss(maps, batch)`, over batches in a seeded order.

    The learning rate has a short warm-up and a cosine decay.

    - `maps`: the layer's maps, float32.
    - `loss`: returns the loss of maps on one batch.
    - `batches`: the batches' numbers.
    - `steps`: how many steps are taken.
    - `rate`: the learning rate of each tensor, relative to its root mean square.
    - `seed`: the seed of the order.
    """
    trained = trainable(maps)
    current = replace(maps, **trained)
    descend(list(trained.values()), lambda batch: loss(current, batch), batches, steps, rate, seed)
    return replace(maps, **{name: value.detach() for name, value in trained.items()})


def trainable(maps: Maps) -> dict[str, Tensor]:
    """Return copies of a layer's maps, by name, that take gradients."""
    return {
        name: value.detach().float().clone().requires_grad_(True)
        for name, value in vars(maps).items()
        if value is not None and value.numel()
    }


def descend(
    tensors: Sequence[Tensor], loss: Callable[[int], Tensor], batches: Sequence[int], steps: int, rate: float, seed: int
) -> None:
    """Take Adam steps on `tensors` in place. The loss depends on these tensors and a batch's number.

    - `tensors`: the tensors to move, float32; one that the loss does not depend on stays.
    - `loss`: returns the loss of one batch.
    - `batches`, `steps`, `rate`, `seed`: as of `gradient_steps`.

    Source: Kingma and Ba 2015, Adam, algorithm 1.
    """
    scales = [rate * max(float(value.detach().square().mean().sqrt()), 1e-8) for value in tensors]
    optimizer = torch.optim.Adam(
        [{"params": [value], "lr": scale} for value, scale in zip(tensors, scales, strict=True)], betas=(0.9, 0.95)
    )
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        if not order:
            order = torch.randperm(len(batches), generator=generator).tolist()
        share = min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = scale * share
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(batches[order.pop()]).backward()
        optimizer.step()
