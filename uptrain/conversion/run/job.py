"""One conversion to run: its plan, its folder and how it runs, passed on as one object."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from uptrain.checkpoint.checksum import Checksum
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.sidecars import Sidecars
from uptrain.checkpoint.source import Source
from uptrain.conversion.plan.planner import Plan
from uptrain.conversion.request import option_words
from uptrain.conversion.run.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Job:
    """A planned conversion and where and how it runs.

    - `source`, `checkpoint`, `plan`: as `plan_conversion` returns them.
    - `out`: the result's folder.
    - `overwrite`: replace `out` if it exists.
    - `sidecars`: the source's other files, which are copied into the result or left out.
    - `options`, `events`: as those of `convert`.
    """

    source: Source
    checkpoint: Checkpoint
    plan: Plan
    out: Path
    overwrite: bool
    sidecars: Sidecars
    options: RunOptions
    events: Events

    @property
    def calibration(self) -> Path:
        """Return the folder next to OUT where calibrated layers wait for the result."""
        return calibration_folder(self.out)

    @property
    def command(self) -> tuple[str, str]:
        """Return the digest of what was asked, by which a repeated command is recognized, and its command line."""
        request, revision = self.plan.request, self.source.revision
        digest = Checksum()
        digest.update(json.dumps([str(self.source.path), request.recorded()], sort_keys=True).encode())
        words = ["uptrain", "convert", self.source.name, *option_words(asdict(request))]
        return digest.text(), shlex.join([*words, *(["--revision", revision] if revision else [])])


def calibration_folder(out: Path) -> Path:
    """Return the folder next to `out` where calibrated layers wait for the result."""
    return out.with_name(out.name + ".uptrain-calibration")
