"""What a run reports: the losses of a step, a step for a progress line, and the finished run. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class LossMetrics:
    """Mean losses over a step's tokens.

    - `loss`: what is trained on, in nats per token.
    - `cross_entropy`: in nats per token.
    - `divergence`: from the teacher, in nats per token; None without a teacher.
    - `hidden`: squared distance from the teacher's hidden states, relative to their squared length; None where the
      recipe does not ask for it.
    """

    loss: float
    cross_entropy: float
    divergence: float | None = None
    hidden: float | None = None

    @staticmethod
    def of(sums: torch.Tensor, tokens: int, teacher: bool, hidden: bool) -> LossMetrics:
        """Return the means of an objective's sums.

        - `sums`: (4,), as `Objective.forward` returns them.
        - `tokens`: the number of tokens that were summed over.
        - `teacher`: whether the objective has a teacher.
        - `hidden`: whether it compares hidden states.
        """
        total, cross_entropy, divergence, distance = (sums / max(1, tokens)).tolist()
        return LossMetrics(
            loss=total,
            cross_entropy=cross_entropy,
            divergence=divergence if teacher else None,
            hidden=distance if hidden else None,
        )

    def log(self) -> dict[str, float]:
        """Return what a log line holds; without a teacher, loss and cross-entropy are the same and stand once."""
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


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """The progress after an optimizer step, as a progress line shows it.

    - `step`, `steps`: the number of this step and of all steps.
    - `tokens`: tokens seen since the run began.
    - `loss`, `held_out_loss`, `divergence`: in nats per token; None where not computed.
    - `learning_rate`, `grad_norm`: of this step; the norm before it was clipped.
    - `tokens_per_second`: over all processes, a mean of the last 50 steps.
    - `seconds_left`: at that speed.
    - `memory_bytes`: the peak memory of this process, on its device.
    - `skipped`: why this step was left out, or "".
    """

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


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """A finished run.

    - `out`: the folder of the trained checkpoint.
    - `steps`, `tokens`: what the run took.
    - `loss`: of the last step, in nats per token.
    - `held_out_loss`, `bits_per_byte`: of the weights that were written, on the held-out text; None without one.
    - `best_step`: the step whose weights were written, where they are not the last ones.
    - `skipped`: the number of steps that were left out.
    - `teacher`: the teacher's name, or None.
    - `precision`: bf16 or fp32, in which products were computed.
    - `resumed_from`: the step that the run was resumed from; 0 for a run that was not interrupted.
    - `num_processes`: how many processes trained.
    - `sharded`: whether weights were divided between processes (FSDP).
    - `isolated`: whether attention stayed within each document of a block.
    - `seconds`: wall time of this call.
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
