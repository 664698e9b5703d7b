"""What a run says while it trains: pace, log lines, and the step a progress line shows."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from uptrain.training.recipe import Recipe


@dataclass(frozen=True)
class Figures:
    """A step's means over its tokens, in nats; `hidden` is relative to the teacher's states. No teacher: None."""

    loss: float
    cross_entropy: float
    divergence: float | None = None
    hidden: float | None = None

    @staticmethod
    def of(sums: torch.Tensor, tokens: int, taught: bool, hidden: bool) -> Figures:
        """Return the means of an objective's sums (4,)."""
        total, cross_entropy, divergence, far = (sums / max(1, tokens)).tolist()
        return Figures(total, cross_entropy, divergence if taught else None, far if hidden else None)

    def log(self) -> dict[str, float]:
        """Return what a log line holds; without a teacher the loss is the cross-entropy and stands once."""
        out = {"loss": self.loss}
        if self.divergence is not None:
            out |= {"cross_entropy": self.cross_entropy, "kl": self.divergence}
        if self.hidden is not None:
            out["hidden"] = self.hidden
        return {name: round(value, 5) for name, value in out.items()}

    def held_out_log(self) -> dict[str, float]:
        """Return what a log line holds of held-out text: its loss is always the cross-entropy."""
        kl = {} if self.divergence is None else {"held_out_kl": round(self.divergence, 5)}
        return {"held_out_loss": round(self.cross_entropy, 5), **kl}


@dataclass(frozen=True)
class Step:
    """Progress after an optimizer step: what a progress line shows."""

    step: int
    steps: int
    tokens: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    seconds_left: float
    held_out_loss: float | None = None
    divergence: float | None = None
    memory_bytes: int = 0
    skipped: str = ""


@dataclass(frozen=True)
class Training:
    """A finished run; losses are in nats per token, `held_out_loss` of what is written.

    `isolated` says whether documents in a block were kept apart.
    """

    out: Path
    steps: int
    tokens: int
    loss: float
    held_out_loss: float | None
    bits_per_byte: float | None
    best_step: int | None
    skipped: int
    teacher: str | None
    precision: str
    resumed_from: int
    num_processes: int
    sharded: bool
    isolated: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "out": str(self.out)}


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

    def add(self, figures: Figures, seconds: float) -> None:
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
