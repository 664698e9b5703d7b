"""What a sweep tries and how it measures: the options of `uptrain sweep` as one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from uptrain.conversion.request import BUILTIN, CALIBRATION_TOKENS
from uptrain.conversion.run.options import MEMORY
from uptrain.data.sources import HELD_OUT, TextSource, text_name
from uptrain.errors import UsageError
from uptrain.evaluation.contexts import CONTEXT
from uptrain.evaluation.settings import EvaluationSettings
from uptrain.methods.registry import needs_text

KEEP = ("all", "best", "none")
DEFAULT_METHODS = ("mean", "svd", "calibrated")


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """How a sweep converts and measures, in the words of `uptrain sweep`.

    - `methods`: the methods to try with every target, in the words of `uptrain convert --method`.
    - `calibrate`: the text for the method calibrated. None: built-in text.
    - `calibration_tokens`: how many tokens of it to use. None: 65,536.
    - `calibration_block`: tokens of a calibration block. None: 1,024, or the model's maximum if that is shorter.
    - `repair_steps`: gradient steps per layer of the method calibrated. None: 40.
    - `text`: the texts to score.
    - `context`: window length in tokens. None: 1024, or all positions of a model that has fewer.
    - `stride`: how many tokens the window moves. None: half of the context.
    - `tokens`: how many tokens of each text to read.
    - `dtype`: dtype of the measurement, as in `EvaluationSettings`.
    - `keep`: which checkpoints to keep: all, best (those on the Pareto front) or none.
    - `memory`: bytes for calibration data in memory, and as many for the source's predictions.
      What doesn't fit is computed again per trial.
    """

    methods: Sequence[str] = DEFAULT_METHODS
    calibrate: str | None = None
    calibration_tokens: int | None = None
    calibration_block: int | None = None
    repair_steps: int | None = None
    text: Sequence[TextSource] = (HELD_OUT,)
    context: int | None = None
    stride: int | None = None
    tokens: int = 32_768
    dtype: str | None = None
    keep: str = "all"
    memory: int = MEMORY

    @property
    def evaluation(self) -> EvaluationSettings:
        """Return the settings of each trial's evaluation: quality only."""
        return EvaluationSettings(
            text=self.text, context=self.context, stride=self.stride, tokens=self.tokens, dtype=self.dtype, repeats=0
        )

    @property
    def calibration(self) -> dict[str, Any]:
        """Return the part of a `Request` that only the method calibrated reads; None where a default is meant."""
        return {
            "calibrate": self.calibrate,
            "calibration_tokens": self.calibration_tokens,
            "calibration_block": self.calibration_block,
            "repair_steps": self.repair_steps,
        }

    def check_keep(self) -> None:
        """Refuse an unknown `keep`.

        Raises:
            UsageError: it is unknown.
        """
        if self.keep not in KEEP:
            raise UsageError(f"--keep {self.keep} is not known. Use {', '.join(KEEP)}.")

    def check_calibration(self) -> None:
        """Refuse settings of calibration where no method calibrates.

        Raises:
            UsageError: there are some.
        """
        if any(needs_text(method) for method in self.methods):
            return
        for option, value in self.calibration.items():
            if value is not None:
                named = f"--{option.replace('_', '-')}"
                raise UsageError(
                    f"{named} is for the method calibrated, not {', '.join(self.methods)}.",
                    f"Leave {named} out, or add calibrated to --methods.",
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as sweep.json records them, with defaults filled in."""
        used = {"calibrate": BUILTIN, "calibration_tokens": CALIBRATION_TOKENS}
        return {
            "text": [text_name(each) for each in self.text],
            "context": CONTEXT if self.context is None else self.context,
            "stride": self.stride,
            "tokens": self.tokens,
            "dtype": self.dtype,
            "repair_steps": None,
            **used,
            **{option: value for option, value in self.calibration.items() if value is not None},
        }
