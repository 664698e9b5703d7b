"""sweep.json: what became of each target and method of one source. docs/sweep.md describes it."""

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


@dataclass(frozen=True)
class Trial:
    """One target by one method, measured against the source.

    `share` is its cache over the source's; `pareto` says that no other trial, nor the source, has as little cache and
    as little KL with less of one. `kept` says that the checkpoint is in the folder `name`; `plan` is the digest of
    its conversion. `convert_seconds` is None where an earlier run converted it and was cut off.
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


@dataclass(frozen=True)
class RefusedTrial:
    """A target and method that can't be, and why, in one sentence."""

    target: str
    method: str
    why: str


@dataclass(frozen=True)
class Sweep:
    """A sweep as far as it got: the source, what was asked, how all was measured, and what became of each.

    `measured` and `original` are empty until the first trial is measured.
    """

    source: Mapping[str, Any]
    settings: Mapping[str, Any]
    measured: Mapping[str, Any]
    original: Mapping[str, Any]
    trials: tuple[Trial, ...]
    refused: tuple[RefusedTrial, ...]

    def with_trial(self, trial: Trial) -> Sweep:
        """Return the sweep with one more trial, by cache and divergence, and with every trial's `pareto` renewed."""
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
    """Tell of each point whether no other is at most as large in both numbers and smaller in one."""
    best: set[tuple[float, float]] = set()
    lowest = float("inf")
    for first, second in sorted(set(points)):
        if second < lowest:
            best.add((first, second))
            lowest = second
    return [point in best for point in points]


def write_sweep(found: Sweep, folder: Path) -> None:
    """Write `folder`'s sweep.json, with the versions it was made by."""
    write_atomic(folder / SWEEP, dump_json({**found.to_dict(), "versions": versions()}))


def read_sweep(folder: Path) -> Sweep | None:
    """Return the sweep that `folder` holds, or None where it has no sweep.json.

    Raises:
        CheckpointError: it has one that is none of a known format.
    """
    path = folder / SWEEP
    if not path.is_file():
        return None
    value = read_json(path)
    try:
        if value["format"] != FORMAT:
            raise ValueError
        parts = {name: dict(value[name]) for name in ("source", "settings", "measured", "original")}
        trials = tuple(_row(Trial, each) for each in value["arms"])
        # Folders are deleted by these names.
        if any(Path(trial.name).name != trial.name or trial.name == ".." for trial in trials):
            raise ValueError
        return Sweep(**parts, trials=trials, refused=tuple(_row(RefusedTrial, each) for each in value["refused"]))
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path} is not a sweep of format {FORMAT}.", "Sweep again, into another folder."
        ) from None


Row = TypeVar("Row", Trial, RefusedTrial)


def _row(kind: type[Row], value: Mapping[str, Any]) -> Row:
    # JSON has lists where there were pairs.
    found: dict[str, Any] = {
        field.name: tuple(each) if isinstance(each := value[field.name], list) else each for field in fields(kind)
    }
    return kind(**found)
