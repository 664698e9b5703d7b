"""The result of an evaluation, and the eval.json that stores it."""

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
from uptrain.evaluation.quality_row import QualityRow
from uptrain.evaluation.samples import Sample
from uptrain.evaluation.speed import SpeedCell
from uptrain.evaluation.tasks import TaskMetric

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ModelMetrics:
    """Metrics of one model: perplexity per token, bits per byte of text, cache bytes per token, tokens per second.

    Tokens per second are medians; `decode_range` is the slowest and the fastest run. `cache_bytes_per_token` of an
    encoder-decoder is that of one source token and one target token together; `cross_bytes_per_token` is the part of
    the source token.
    """

    name: str
    perplexity: float
    bits_per_byte: float
    cache_bytes_per_token: int
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    decode_range: tuple[float, float] | None = None
    cross_bytes_per_token: int = 0


@dataclass(frozen=True, kw_only=True)
class EvaluationRun:
    """What one run measured and how, so that later runs can be stored in the same file.

    - `weights`: digest of the model's weights and config at that time.
    - `baseline`: the baseline's name and digest, or None.
    - `dtype`, `device`: what quality was computed in, and on.
    - `speed_dtype`, `speed_repeats`: conditions of the speed measurement.
    - `peak_memory_bytes`: most memory that the run held.
    - `settings`: what was asked for.
    - `versions`: of Python and packages.
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


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics of a model, of its baseline on the same tokens, and how far their predictions differ.

    - `model`, `baseline`: metrics of each; None without a baseline. Their speed is that of one sequence at
      `speed_context`, the first context.
    - `kl`: mean of KL(baseline ‖ model) in nats per token.
    - `top1_agreement`: share of tokens at which both models rank the same token first.
    - `tokens`, `context`, `stride`, `windows`, `kl_interval`, `perplexity_ratio`, `top5_agreement`, `flip_rate`:
      as in `QualityRow`, of all texts at the longest context.
    - `dtype`, `device`: what quality, tasks, retrieval and samples were computed in, and on.
    - `speed_dtype`: dtype of the model when speed was measured. Cache and speed are measured in each checkpoint's own
      dtype; speed of bfloat16 is measured in float32 on a device that can't multiply bfloat16.
    - `peak_memory_bytes`: most memory of the measurement with all models loaded: of the accelerator, on a CPU of the
      process.
    - `rows`: quality by text and context; `speeds`: by batch and context; `needle`: retrieval; `samples`:
      continuations; `tasks`: lm-eval's.
    - `run`: what was measured and how.
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
        """Return plain JSON values; docs/evaluation.md describes each."""
        values = asdict(self)
        run = values.pop("run")
        if run is not None:
            for part in PARTS:
                values[part] = tuple({**entry, "run": 0} for entry in values[part])
            measured = {"quality": 0, "speed": 0 if self.speeds else None}
            values |= {"parts": measured, "runs": (run,), "stale": {}}
        return {"format": FORMAT, **values}


def save_place(model: str, out: Path | None) -> Path | None:
    """Return the file for an evaluation of `model`: `out`, else eval.json in a folder that uptrain wrote.

    Returns None where there is no such folder, it can't be written to, or its manifest already lists an eval.json.

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
    """Write an evaluation to `path`, together with what the file already has, as docs/evaluation.md describes.

    Returns sentences about what the file still has of earlier runs.

    Raises:
        CheckpointError: a perplexity is not finite, so the weights are broken.
    """
    for measured in filter(None, (found.model, found.baseline)):
        if not math.isfinite(measured.perplexity):
            raise CheckpointError(
                f"{measured.name} has no finite perplexity, so {path} is not written.", "Convert or train it again."
            )
    with alone_in(path.absolute().parent):
        values, notes = _with_earlier(json.loads(dump_json(found.to_dict())), path)
        write_atomic(path, dump_json({**values, "versions": versions()}))
    return notes


def _with_earlier(values: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    if not path.is_file() or "runs" not in values:
        return values, []
    try:
        earlier = read_json(path)
    except CheckpointError as error:
        return values, [f"{error.message} Nothing in it could be read, so it was replaced."]
    return merged(earlier, values)
