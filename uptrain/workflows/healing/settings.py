"""The settings of healing: how long a converted model learns from its source, and the recipe that this makes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uptrain.checkpoint.manifest import converted_from
from uptrain.conversion.plan.planner import Plan
from uptrain.conversion.run.prepare import Planned
from uptrain.data.sources import Dataset, TextSource
from uptrain.data.weighted_texts import weighted_texts
from uptrain.errors import UsageError
from uptrain.training.recipe import Recipe

RATE, WIDTH = 3e-4, 576
"""The learning rate that measured best, and the hidden size of the model that it was measured on."""
BLOCK = 256
"""Tokens of a block, where the model's positions allow it."""
SHORT = 65_536
"""Tokens up to which each step has one block: a short text gives little, so that many small steps take more of it."""


@dataclass(frozen=True, kw_only=True)
class HealSettings:
    """How a converted model is healed: trained on the calibration text to predict what its source predicts.

    - `tokens`: tokens to train on, rounded up to whole steps; the text is read again where it has fewer.
    - `learning_rate`: None for 3e-4 · 576 / hidden_size, at most 3e-4.
    - `block_size`: tokens of a block; None for 256, or all positions of a model that has fewer.
    - `batch_size`: blocks of a step; None for one, and the square root of tokens / 65,536 beyond 65,536 tokens.
    - `overwrite`: replace OUT if it exists.
    """

    tokens: int
    learning_rate: float | None = None
    block_size: int | None = None
    batch_size: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"--heal {self.tokens} is not a positive number of tokens.")

    def check(self, plan: Plan) -> None:
        """Refuse a plan whose result can't be healed.

        Raises:
            UsageError: no text or no change of heads is planned, or its result can't be trained.
        """
        request, source = plan.request, plan.source
        if not request.chosen_method.needs_text:
            raise UsageError(
                f"--heal {self.tokens} requires --method calibrated, not {request.method}: it trains on its text.",
                "Leave it out, or add --calibrate TEXT.",
            )
        if plan.before == plan.after:
            raise UsageError(
                f"--heal {self.tokens} has no effect: {source.name} keeps all its key/value heads.", "Leave it out."
            )
        if source.wrapped_in:
            raise UsageError(
                f"--heal {self.tokens} can't be used on {source.name}: uptrain trains no {source.wrapped_in}.",
                "Leave it out.",
            )

    def recipe(self, planned: Planned, converted: Path, out: Path) -> Recipe:
        """Return the recipe that heals.

        - `planned`: the conversion.
        - `converted`: the folder of its result.
        - `out`: the folder of the healed model.

        The learning rate falls with the width, as the best rate of a matrix does.

        Source: Yang et al. 2022, "Tensor Programs V", table 3 (Adam, hidden weights).
        """
        source, plan = planned.source, planned.plan
        earlier = converted_from(source.path)
        rate = RATE * min(1.0, WIDTH / plan.source.hidden_size)
        block = min(BLOCK, _positions(plan) or BLOCK)
        return Recipe.model_validate(
            {
                "model": str(converted),
                "allow_pickle": source.allow_pickle,
                "output": out,
                "overwrite": self.overwrite,
                "data": texts(plan),
                # Without a name the teacher is the first source in the history, which may be an older model.
                "distill": {"teacher": str(source.path) if earlier else None},
                "tokens": self.tokens,
                "block_size": self.block_size or block,
                "batch_size": self.batch_size or max(1, round(math.sqrt(self.tokens / SHORT))),
                "learning_rate": self.learning_rate or float(f"{rate:.2g}"),
                "min_lr_ratio": 0.0,
                "warmup": 0.1,
                "weight_decay": 0.0,
                "seed": plan.request.chosen_seed,
            }
        )


def texts(plan: Plan) -> list[TextSource]:
    """Return the calibration texts of a plan as a recipe reads them, with their weights where there are several.

    A dataset is streamed, so that its beginning is read.

    Raises:
        UsageError: one of them does not exist.
    """
    found = weighted_texts("--calibrate", plan.request.chosen_text)
    return [_in_recipe(each.source, each.weight if len(found) > 1 else None) for each in found]


def _in_recipe(source: TextSource, weight: float | None) -> TextSource:
    streamed = {"stream": True} if isinstance(source, Dataset) else {}
    return source.model_copy(update={"weight": weight, **streamed})


def recorded(recipe: Recipe) -> dict[str, Any]:
    """Return the part of a recipe by which an unfinished run is recognized."""
    values = recipe.to_dict()
    return {key: value for key, value in values.items() if key not in ("output", "overwrite", "allow_pickle")}


def _positions(plan: Plan) -> int | None:
    found = plan.source.config.get(plan.source.family.keys.max_position_embeddings)
    return found if isinstance(found, int) else None
