"""The settings of a calibration. The defaults are the values that measured best."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uptrain.data.boundary import Boundary

REPAIRS = ("attention", "blocks")
"""What gradient steps may change: attention alone, or a layer's norms and MLP too."""
BLOCK_STEPS = 200
"""Gradient steps per layer of `--repair blocks`, after those of attention."""


@dataclass(frozen=True)
class CalibrationSettings:
    """What calibration tries and what it may use.

    - `held_out`: share of the blocks that choices are made on and nothing is fitted to.
    - `probes`: number of blocks that moments are gathered on.
    - `moments`: activations to gather moments on: `sequence` (of the converted layers), `original`, and `both` (blocks
      of either in turn).
    - `refitted`: number of candidates of least error whose refits are compared before the steps; 0 takes the best as it
      is. What is chosen is refitted on all blocks after them.
    - `trials`: number of blocks that these refits are compared on.
    - `drifts`: shares of the error so far that a refit corrects.
    - `dampings`: values of a refit's λ.
    - `independent`: whether a refit on the original activations is tried too.
    - `first_token`: weight of a document's first token, which attention reads when it needs nothing else, by the share
      of the block that the document has.
    - `repair_steps`: gradient steps per layer.
    - `rate`: their learning rate, relative to each tensor's root mean square.
    - `block_steps`: gradient steps per layer that also move its norms and MLP; 0 leaves those as they are.
    - `block_rate`: the learning rate of these steps, relative to each tensor's root mean square.
    - `seed`: the seed of the order of blocks.
    - `boundary`: the token between documents of a block that are kept apart, None for attention over whole blocks.
    - `text_of`: which text each block is from; empty for a single text.
    - `memory`: bytes that activations may take; beyond, they go to files.
    - `folder`: where those files are made, None for none.
    """

    held_out: float = 1 / 16
    probes: int = 8
    moments: tuple[str, ...] = ("both",)
    refitted: int = 0
    trials: int = 12
    drifts: tuple[float, ...] = (0.0, 0.5, 1.0)
    dampings: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    independent: bool = False
    first_token: float = 300.0
    repair_steps: int = 40
    rate: float = 0.01
    block_steps: int = 0
    block_rate: float = 0.003
    seed: int = 0
    boundary: Boundary | None = None
    text_of: tuple[int, ...] = ()
    memory: int = 2 * 2**30
    folder: Path | None = None
