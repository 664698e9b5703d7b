"""sweep.json: the results of a sweep over targets and methods. docs/sweep.md describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from uptrain.checkpoint.files import write_atomic
from uptrain.checkpoint.jsonfile import dump_json, read_json
from uptrain.checkpoint.manifest import versions
from uptrain.errors import CheckpointError

SWEEP = "sweep.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One target by one method, measured against the source.

    - `share`: the trial's cache bytes over the source's.
    - `pareto`: whether no other trial, nor the source, has as little cache and as little KL with less of one.
    - `convert_seconds`: None where an earlier run converted the checkpoint and was interrupted.
    - `kept`: whether the checkpoint is in the folder `name`.
    - `plan`: digest of the conversion's plan.

    The other metrics are those of `Evaluation`.
    """

    name: str
    target: str
    method: str
    cache_bytes_per_token: int
    share: float
    perplexity: float
    perplexity_ratio: float
    perplexity_ratio_interval: tuple[float, float] | None
    kl: float
    kl_interval: tuple[float, float] | None
    top1_agreement: float
    top5_agreement: float
    flip_rate: float
    convert_seconds: float | None
    evaluate_seconds: float
    pareto: bool
    kept: bool
    plan: str


@dataclass(frozen=True, kw_only=True)
class RefusedTrial:
    """A target and method that can't be combined, and why, in one sentence."""

    target: str
    method: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep and its results so far.

    - `source`: name, origin and revision of the model.
    - `settings`: what was asked for.
    - `measured`: how every trial was measured; empty until the first one is.
    - `original`: metrics of the source; empty until the first trial is measured.
    - `trials`: the measured trials, sorted by cache bytes and KL; their key in sweep.json is `arms`.
    - `refused`: targets and methods that can't be combined.
    """

    source: Mapping[str, Any]
    settings: Mapping[str, Any]
    measured: Mapping[str, Any]
    original: Mapping[str, Any]
    trials: tuple[Trial, ...]
    refused: tuple[RefusedTrial, ...]

    def with_trial(self, trial: Trial) -> Sweep:
        """Return the sweep with one more trial, sorted by cache bytes and KL, and update every trial's `pareto`."""
        trials = sorted((*self.trials, trial), key=lambda each: (each.cache_bytes_per_token, each.kl))
        points = [(float(each.cache_bytes_per_token), each.kl) for each in trials]
        best = pareto([*points, (float(self.original["cache_bytes_per_token"]), 0.0)])
        marked = (replace(each, pareto=one) for each, one in zip(trials, best, strict=False))
        return replace(self, trials=tuple(marked))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = {"arms" if name == "trials" else name: value for name, value in asdict(self).items()}
        return {"format": FORMAT, **values}


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Tell for each point whether no other point is at most as large in both numbers and smaller in one."""
    best: set[tuple[float, float]] = set()
    lowest = float("inf")
    for first, second in sorted(set(points)):
        if second < lowest:
            best.add((first, second))
            lowest = second
    return [point in best for point in points]


def write_sweep(found: Sweep, folder: Path) -> None:
    """Write sweep.json into `folder`, with the versions of Python and packages."""
    write_atomic(folder / SWEEP, dump_json({**found.to_dict(), "versions": versions()}))


def read_sweep(folder: Path) -> Sweep | None:
    """Return the sweep that `folder` holds, or None where it has no sweep.json.

    Raises:
        CheckpointError: it has one of an unknown format.
    """
    path = folder / SWEEP
    if not path.is_file():
        return None
    value = read_json(path)
    try:
        if value["format"] != FORMAT:
            raise ValueError
        parts = {name: dict(value[name]) for name in ("source", "settings", "measured", "original")}
        trials = tuple(_entry(Trial, each) for each in value["arms"])
        # Folders are deleted by these names.
        if any(Path(trial.name).name != trial.name or trial.name == ".." for trial in trials):
            raise ValueError
        return Sweep(**parts, trials=trials, refused=tuple(_entry(RefusedTrial, each) for each in value["refused"]))
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path} is not a sweep of format {FORMAT}.", "Sweep again into another folder."
        ) from None


_T = TypeVar("_T", Trial, RefusedTrial)


def _entry(kind: type[_T], value: Mapping[str, Any]) -> _T:
    # JSON has lists where there were pairs.
    found: dict[str, Any] = {
        field.name: tuple(each) if isinstance(each := value[field.name], list) else each for field in fields(kind)
    }
    return kind(**found)
