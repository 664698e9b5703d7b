"""What an evaluation found, and the eval.json it is kept in."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from uptrain.checkpoint.files import write_atomic
from uptrain.checkpoint.jsonfile import dump_json, read_json
from uptrain.checkpoint.locks import alone_in
from uptrain.checkpoint.manifest import EVALUATION, read_manifest, versions
from uptrain.errors import CheckpointError, UsageError
from uptrain.evaluation.merge import PARTS, merged
from uptrain.evaluation.needle import NeedleCell
from uptrain.evaluation.quality import QualityRow
from uptrain.evaluation.samples import Sample
from uptrain.evaluation.speed import SpeedCell
from uptrain.evaluation.tasks import TaskMetric

FORMAT = 1


@dataclass(frozen=True)
class ModelMetrics:
    """One model's figures: perplexity per token, bits per byte of text, cache bytes per token, tokens per second.

    Speeds are medians; `decode_range` is the slowest and the fastest run. `cross_bytes_per_token` is what of the cache
    a token of the source costs, where the decoder reads an encoder; the rest is a token of the target's.
    """

    name: str
    perplexity: float
    bits_per_byte: float
    cache_bytes_per_token: int
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    decode_range: tuple[float, float] | None = None
    cross_bytes_per_token: int = 0


@dataclass(frozen=True)
class EvaluationRun:
    """What a measurement was of and how it was taken, so that later ones can be put beside it.

    `weights` digests the model's weights and config as they were then, `baseline` has the baseline's name and digest.
    `settings` are what was asked for.
    """

    weights: str
    baseline: dict[str, str] | None
    dtype: str
    device: str
    speed_dtype: str
    speed_repeats: int
    peak_memory_bytes: int
    settings: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class Evaluation:
    """A model's figures, the baseline's on the same tokens, and how far apart their predictions are.

    `rows` has them by text and context. The others are those of all texts at the longest context: `kl` is the mean
    of KL(baseline ‖ model) in nats per token; `top1_agreement` the share of tokens at which both rank the same one
    first; the rest as in `QualityRow`. `dtype` is what these and perplexity were computed in; cache and speed are
    measured in each checkpoint's own dtype, as it would be served; only that the speed of bfloat16 is taken in
    float32 on a device that can't multiply it. `speed_dtype` is the model's. `peak_memory_bytes` is the whole
    measurement's, with both models loaded: the accelerator's, or on a CPU the process's. `tasks` (lm-eval's),
    `needle` (retrieval) and `samples` (continuations) are in the dtype of quality.
    `speeds` are by batch and context; those of each model are of one sequence at `speed_context`, the first.
    """

    model: ModelMetrics
    baseline: ModelMetrics | None
    kl: float | None
    top1_agreement: float | None
    tokens: int
    context: int
    stride: int
    speed_context: int
    speed_dtype: str
    dtype: str
    device: str
    windows: int = 0
    texts: tuple[str, ...] = ()
    kl_interval: tuple[float, float] | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_interval: tuple[float, float] | None = None
    top5_agreement: float | None = None
    flip_rate: float | None = None
    speed_repeats: int = 0
    peak_memory_bytes: int | None = None
    rows: tuple[QualityRow, ...] = ()
    tasks: tuple[TaskMetric, ...] = ()
    needle: tuple[NeedleCell, ...] = ()
    samples: tuple[Sample, ...] = ()
    speeds: tuple[SpeedCell, ...] = ()
    run: EvaluationRun | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; docs/evaluation.md says what each means."""
        values = asdict(self)
        run = values.pop("run")
        if run is not None:
            for part in PARTS:
                values[part] = tuple({**entry, "run": 0} for entry in values[part])
            measured = {"quality": 0, "speed": 0 if self.speeds else None}
            values |= {"parts": measured, "runs": (run,), "stale": {}}
        return {"format": FORMAT, **values}


def save_place(model: str, out: Path | None) -> Path | None:
    """Return the file an evaluation of `model` goes to: `out`, else eval.json in a folder that uptrain wrote.

    None where there is no such folder, it can't be written to, or its manifest lists an eval.json already.

    Raises:
        UsageError: `out` can't be written.
    """
    if out is not None:
        folder = out.resolve().parent
        if out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"{out} can't be written.", "Name a file in a folder that exists.")
        return out
    folder = Path(model).expanduser()
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return None
    manifest = read_manifest(folder)
    return None if manifest is None or EVALUATION in manifest["files"] else folder / EVALUATION


def write_evaluation(found: Evaluation, path: Path) -> list[str]:
    """Write an evaluation beside what the file at `path` has, as docs/evaluation.md describes.

    Returns sentences on what the file still has of earlier runs.

    Raises:
        CheckpointError: a perplexity is no number, so the weights are broken.
    """
    for measured in filter(None, (found.model, found.baseline)):
        if not math.isfinite(measured.perplexity):
            raise CheckpointError(
                f"{measured.name} has no finite perplexity, so {path} is not written.", "Convert or train it again."
            )
    with alone_in(path.absolute().parent):
        values, notes = _beside_earlier(json.loads(dump_json(found.to_dict())), path)
        write_atomic(path, dump_json({**values, "versions": versions()}))
    return notes


def _beside_earlier(values: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    if not path.is_file() or "runs" not in values:
        return values, []
    try:
        earlier = read_json(path)
    except CheckpointError as error:
        return values, [f"{error.message} Nothing in it could be read, so it was replaced."]
    return merged(earlier, values)
