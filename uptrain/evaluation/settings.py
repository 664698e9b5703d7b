"""What an evaluation measures, and how: the options of `uptrain eval` as objects. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uptrain.data.sources import HELD_OUT, TextSource

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where a pass key is hidden by default, as a share of the filler text before it."""


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Which tasks of lm-eval to run.

    - `names`: names that lm-eval knows, or paths of task YAML files.
    - `include_path`: a folder with more task YAML files, or None.
    - `limit`: how many documents of each task to use; None for all.
    """

    names: tuple[str, ...]
    include_path: str | None = None
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class NeedleSettings:
    """Which prompts with a hidden pass key to ask.

    - `lengths`: prompt lengths in tokens; empty for the contexts of the quality measurement.
    - `depths`: shares of the filler text before the key, 0 to 1.
    - `trials`: number of prompts per length and depth.
    """

    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = DEPTHS
    trials: int = 10


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What to measure, in the words of `uptrain eval`.

    - `text`: the texts to score; each one is a row of the result.
    - `context`: window lengths in tokens. None: 1024, or all positions of a model that has fewer.
    - `stride`: how many tokens the window moves. None: half of each context.
    - `tokens`: how many tokens of each text to read.
    - `speed_context`: prefill lengths in tokens. None: 512, or what the model has positions for.
    - `speed_batch`: batch sizes for the speed measurement; 1 is always measured too.
    - `decode_tokens`: tokens to decode after each prefill.
    - `repeats`: timed runs per batch and context; 0 leaves speed out.
    - `dtype`: dtype of the quality measurement (float32, bfloat16 or float16).
      None: float32 on a CPU, elsewhere the checkpoint's dtype.
    - `tasks`: tasks of lm-eval, or None.
    - `needle`: prompts with a hidden pass key, or None.
    - `samples`: how many openings of each text the models continue.
    - `sample_tokens`: tokens of each continuation.
    """

    text: Sequence[TextSource] = (HELD_OUT,)
    context: int | Sequence[int] | None = None
    stride: int | None = None
    tokens: int = 32_768
    speed_context: int | Sequence[int] | None = None
    speed_batch: int | Sequence[int] = 1
    decode_tokens: int = 32
    repeats: int = 5
    dtype: str | None = None
    tasks: TaskSettings | None = None
    needle: NeedleSettings | None = None
    samples: int = 0
    sample_tokens: int = 48

    @property
    def contexts(self) -> tuple[int, ...]:
        """Return the window lengths in tokens; empty where none were given."""
        return listed(self.context)

    @property
    def speed_contexts(self) -> tuple[int, ...]:
        """Return the prefill lengths in tokens; empty where none were given."""
        return listed(self.speed_context)

    @property
    def speed_batches(self) -> tuple[int, ...]:
        """Return the batch sizes of the speed measurement in ascending order; 1 is one of them."""
        return tuple(sorted({1, *listed(self.speed_batch)}))

    @property
    def for_decoders_only(self) -> bool:
        """Tell whether something is asked that an encoder-decoder can't do: tasks, needles or samples."""
        return bool(self.tasks or self.needle or self.samples)


def listed(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return one number or several as a tuple without repetitions; None is an empty tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(dict.fromkeys(value))
