"""Steps whose loss or gradient is not usable: left out or fatal, as the recipe says."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from uptrain.errors import UptrainError
from uptrain.training.recipe import Recipe

_LIMIT = 10
"""Skipped steps in a row that stop a run: skipping does not help any more."""


class LossGuard:
    """Compares each step's loss with those before it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.recent: deque[float] = deque(maxlen=50)
        self.skipped = 0
        self._in_a_row = 0

    def check(self, step: int, loss: float, norm: float) -> str:
        """Return "" for a step to take, or the reason to log for a step to skip.

        - `step`: the step's number, from 1.
        - `loss`: its loss in nats per token.
        - `norm`: the norm of its gradient before it was clipped.

        Raises:
            UptrainError: the step is unusable and the recipe says stop, or it is the tenth in a row.
        """
        problem = self._problem(loss, norm)
        if not problem:
            self._in_a_row = 0
            self.recent.append(loss)
            return ""
        size = self.recipe.batch_size
        where = f"{problem} at step {step}, on sequences {step * size - size:,} to {step * size - 1:,} of the run"
        self._in_a_row += 1
        if self.recipe.on_bad_loss == "skip" and self._in_a_row < _LIMIT:
            self.skipped += 1
            return where + "; the step was left out."
        raise UptrainError(
            f"{where}." if self._in_a_row < _LIMIT else f"{where}, the {_LIMIT}th in a row.",
            "Lower learning_rate or max_grad_norm, or set on_bad_loss: skip; the same command goes on from the last "
            "checkpoint.",
        )

    def _problem(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"The loss became {loss}"
        if not math.isfinite(norm):
            return f"The gradient's norm became {norm}"
        spike = self.recipe.spike
        usual = sorted(self.recent)[len(self.recent) // 2] if len(self.recent) >= 10 else None
        if spike is not None and usual is not None and loss > spike * usual:
            return f"The loss rose to {loss:.4g}, more than {spike:g} times the usual {usual:.4g},"
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Return what later decisions depend on, as plain JSON values."""
        return {"recent": list(self.recent), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.skipped = int(state["skipped"])
        self.recent.extend(state["recent"])
