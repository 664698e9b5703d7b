"""How calibration goes about it: one frozen set of knobs, with the values that measured best as defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CalibrationSettings:
    """Set what calibration tries and what it may use.

    `held_out` is the share of blocks that choices are made on and nothing is fitted to; `probes` the number of blocks
    that moments are gathered on; `moments` and `drifts` and `dampings` what is tried for a layer; `first_token` how
    many times more the first token of a block counts, because it is where attention goes when it has nowhere to go.
    `repair_steps` gradient steps follow, at `rate` × each tensor's root mean square. Activations beyond `memory`
    bytes go to files in `folder`, unless that is None.
    """

    held_out: float = 1 / 16
    probes: int = 8
    moments: tuple[str, ...] = ("sequence", "original")
    drifts: tuple[float, ...] = (0.0, 0.5, 1.0)
    dampings: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    independent: bool = True
    first_token: float = 300.0
    repair_steps: int = 40
    rate: float = 0.01
    seed: int = 0
    memory: int = 2 * 2**30
    folder: Path | None = None
