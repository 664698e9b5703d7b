"""What a run logs while it trains: the pace, and the losses since the last log line."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from uptrain.training.metrics import LossMetrics
from uptrain.training.recipe import Recipe


class Journal:
    """The figures since the last log line, the pace, and the losses that a spike is measured against."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.window: list[dict[str, float]] = []
        self.recent: deque[float] = deque(maxlen=50)
        self.pace: deque[float] = deque(maxlen=50)
        self.skipped = 0

    def complaint(self, loss: float, norm: float) -> str:
        """Return what is wrong with a step, in words, or nothing."""
        if not math.isfinite(loss):
            return f"The loss became {loss}"
        if not math.isfinite(norm):
            return f"The gradient's norm became {norm}"
        usual = sorted(self.recent)[len(self.recent) // 2] if len(self.recent) >= 10 else None
        if self.recipe.spike is not None and usual is not None and loss > self.recipe.spike * usual:
            return f"The loss rose to {loss:.4g}, more than {self.recipe.spike:g} times the usual {usual:.4g},"
        return ""

    def add(self, figures: LossMetrics, seconds: float) -> None:
        """Count a step that was taken."""
        self.window.append(figures.log())
        self.recent.append(figures.loss)
        self.pace.append(seconds)

    def entry(self, step: int, learning_rate: float, norm: float) -> dict[str, Any]:
        """Return the log line that ends the window, and begin another."""
        names = self.window[-1] if self.window else {}
        means = {name: round(sum(each[name] for each in self.window) / len(self.window), 5) for name in names}
        self.window = []
        return {
            "step": step, "tokens": step * self.recipe.tokens_per_step, **means,
            "lr": float(f"{learning_rate:.4g}"), "grad_norm": round(norm, 4), "tokens_per_s": round(self.speed),
        }  # fmt: skip

    @property
    def seconds_per_step(self) -> float:
        """Return the mean over the last 50 steps."""
        return sum(self.pace) / len(self.pace) if self.pace else math.inf

    @property
    def speed(self) -> float:
        """Return tokens per second, over all processes."""
        return self.recipe.tokens_per_step / self.seconds_per_step

    def state_dict(self) -> dict[str, Any]:
        """Return what later decisions and log lines depend on."""
        return {"window": self.window, "recent": list(self.recent), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up saved figures."""
        self.window, self.skipped = list(state["window"]), int(state["skipped"])
        self.recent.extend(state["recent"])
