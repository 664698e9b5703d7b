"""Measure a model, alone or against a baseline: load the pair, measure each part, and return the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from uptrain.checkpoint.checksum import Checksum
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.manifest import versions
from uptrain.checkpoint.source import resolve
from uptrain.evaluation.fit import fit_settings
from uptrain.evaluation.needle import measure_retrieval
from uptrain.evaluation.pair import ModelPair, open_pair
from uptrain.evaluation.quality import ALL, measure_quality
from uptrain.evaluation.quality_row import QualityRow
from uptrain.evaluation.reference import Reference
from uptrain.evaluation.result import Evaluation, EvaluationRun, ModelMetrics
from uptrain.evaluation.samples import write_samples
from uptrain.evaluation.settings import EvaluationSettings
from uptrain.evaluation.speed import SpeedCell, cache_bytes_per_token, measure_speed
from uptrain.evaluation.tasks import load_tasks, run_tasks
from uptrain.models import devices, loading
from uptrain.models.peak_memory import memory_bytes

_OF_ROW = (
    "kl", "top1_agreement", "tokens", "context", "stride", "windows", "kl_interval", "perplexity_ratio",
    "perplexity_ratio_interval", "top5_agreement", "flip_rate",
)  # fmt: skip
_OF_CELL = ("prefill_tokens_per_second", "decode_tokens_per_second", "decode_range")


@devices.full_fp32()
@devices.enough_memory("Evaluating", "Compute in a smaller --dtype, or on --device cpu.")
def evaluate(
    model: str,
    settings: EvaluationSettings | None = None,
    *,
    baseline: str | Reference | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    events: Events = Events(),
) -> Evaluation:
    """Measure a model, and a baseline on the same tokens.

    Perplexity slides a window of `context` tokens by `stride` and scores each token once, with at least
    `context - stride` tokens before it; `stride == context` is plain block perplexity. An encoder reads those tokens,
    and the decoder writes the `stride` tokens after them.

    - `model`: a checkpoint folder, a Hub id, or `demo`.
    - `settings`: what to measure; None for the defaults.
    - `baseline`: a model to compare with, named like `model`; None compares with nothing. A `Reference` stores what it
      predicts for further evaluations.
    - `revision`: branch, tag or commit of `model`, where it is a Hub id.
    - `allow_pickle`: also read .bin weights, with torch's restricted unpickler.
    - `events`: `part` is called with the progress of each part, `note` with sentences for the user.

    Raises:
        UsageError: a text is too short, the baseline has another tokenizer or another kind of family, a size
            doesn't fit, or the model can't do what is asked.
        CheckpointError: a model can't be loaded.
    """
    settings = settings or EvaluationSettings()
    loading.quiet()
    reference = Reference(resolve(baseline, None, allow_pickle)) if isinstance(baseline, str) else baseline
    opened = open_pair(resolve(model, revision, allow_pickle), reference, settings)
    # Tasks are loaded before the models: a task that can't run is refused early.
    tasks = load_tasks(settings.tasks) if settings.tasks else None
    pair = opened.load(settings.dtype)
    settings = fit_settings(settings, pair, events.note)

    rows = measure_quality(pair, settings, events)
    task_metrics = run_tasks(pair, tasks, settings.tasks.limit, events) if settings.tasks else []
    cells = measure_retrieval(pair, settings, events)
    samples = write_samples(pair, settings, events)
    dtype = pair.dtype
    pair.place_as_served()
    cache = [cache_bytes_per_token(each) for each in pair.models]
    pair.place_for_speed()
    speeds = measure_speed(pair, settings, events)

    peak = memory_bytes(pair.device)
    headline, first_speed = rows[-1], speeds[0] if speeds else None
    measured = _model_metrics(pair.names, cache, headline, first_speed)
    run = EvaluationRun(
        weights=pair.weights,
        baseline={"name": pair.names[1], "weights": reference.weights()} if reference else None,
        dtype=dtype,
        device=str(pair.device),
        speed_dtype=pair.dtype,
        speed_repeats=settings.repeats,
        peak_memory_bytes=peak,
        settings=_recorded(settings, pair),
        versions=versions(),
    )
    return Evaluation(
        model=measured[0],
        baseline=measured[1] if reference else None,
        **{name: getattr(headline, name) for name in _OF_ROW},
        speed_context=first_speed.context if first_speed else 0,
        speed_dtype=run.speed_dtype,
        dtype=dtype,
        device=run.device,
        texts=tuple(pair.texts),
        speed_repeats=settings.repeats,
        peak_memory_bytes=run.peak_memory_bytes,
        rows=tuple(rows),
        tasks=tuple(task_metrics),
        needle=tuple(cells),
        samples=tuple(samples),
        speeds=tuple(speeds),
        run=run,
    )


def _model_metrics(
    names: Sequence[str], cache: Sequence[tuple[int, int]], headline: QualityRow, speed: SpeedCell | None
) -> list[ModelMetrics]:
    """Return each model's own metrics: its cache bytes, quality of one row, and speed of one cell."""
    found = []
    for name, (whole, cross), prefix in zip(names, cache, ("", "baseline_"), strict=False):
        own = {key: getattr(headline, f"{prefix}{key}") for key in ("perplexity", "bits_per_byte")}
        own |= {key: None if speed is None else getattr(speed, f"{prefix}{key}") for key in _OF_CELL}
        found.append(ModelMetrics(name=name, cache_bytes_per_token=whole, cross_bytes_per_token=cross, **own))
    return found


def _recorded(settings: EvaluationSettings, pair: ModelPair) -> dict[str, Any]:
    """Return the settings as eval.json records them, with digests of the texts."""
    return {
        "texts": list(pair.texts),
        "text_digests": _digests({name: text.ids for name, text in pair.texts.items()}),
        "contexts": list(settings.contexts),
        "stride": settings.stride,
        "tokens": settings.tokens,
        "tasks": asdict(settings.tasks) if settings.tasks else None,
        "needle": asdict(settings.needle) if settings.needle else None,
        "samples": settings.samples,
        "sample_tokens": settings.sample_tokens,
        "speed_contexts": list(settings.speed_contexts),
        "speed_batches": list(settings.speed_batches),
        "decode_tokens": settings.decode_tokens,
    }


def _digests(texts: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Digest the tokens of each text, and of all texts together: a file may hold another text the next time.

    The keys are numbers of tokens: the whole text, and its first 32, 64, 128, … tokens. So runs that read
    more or less of a text can be compared. All texts together have the digest of the whole only.
    """

    def digest(ids: Any) -> str:
        checksum = Checksum()
        checksum.update(np.asarray(ids, np.int64).tobytes())
        return checksum.text()

    found = {}
    for name, ids in texts.items():
        lengths = {len(ids), *(2**power for power in range(5, len(ids).bit_length()))}
        found[name] = {str(length): digest(ids[:length]) for length in sorted(lengths)}
    if len(found) > 1:
        together = np.concatenate([np.asarray(ids, np.int64) for ids in texts.values()])
        found[ALL] = {str(len(together)): digest(together)}
    return found
