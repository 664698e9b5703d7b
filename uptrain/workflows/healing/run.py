"""Convert and heal: the converted model learns its source's predictions on the calibration text, and that is OUT."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from uptrain.checkpoint.events import Events
from uptrain.checkpoint.jsonfile import read_json
from uptrain.checkpoint.manifest import read_manifest
from uptrain.checkpoint.output_folder import check_out, friendly_errors, remove
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import Conversion, run_plan
from uptrain.conversion.run.options import RunOptions
from uptrain.conversion.run.prepare import Planned, default_out, plan_conversion
from uptrain.conversion.run.stage import energy_in
from uptrain.errors import CheckpointError, UsageError
from uptrain.training.recipe import Recipe
from uptrain.training.run_folder import RunFolder
from uptrain.workflows.healing.settings import HealSettings, recorded

if TYPE_CHECKING:
    from uptrain.training.metrics import TrainingResult


@dataclass(frozen=True, kw_only=True)
class Healed:
    """What converting and healing did: the `conversion`, whose folder holds the healed model, and the `training`.

    `training` is None where an earlier run had finished it.
    """

    conversion: Conversion
    training: TrainingResult | None


@dataclass(frozen=True, kw_only=True)
class Healing:
    """A conversion and its healing, as two steps. Either goes on where an interrupted run of it stopped.

    - `planned`: the conversion.
    - `out`: the folder of the healed model. The converted one stands next to it until healing is finished.
    - `settings`: how to heal.
    - `options`: how the conversion runs.
    """

    planned: Planned
    out: Path
    settings: HealSettings
    options: RunOptions = RunOptions()

    @property
    def converted(self) -> Path:
        """Return the folder of the converted model, before it is healed."""
        return self.out.with_name(self.out.name + ".uptrain-unhealed")

    @cached_property
    def recipe(self) -> Recipe:
        """Return the recipe that heals."""
        return self.settings.recipe(self.planned, self.converted, self.out)

    def check(self) -> None:
        """Refuse what can't be healed, before hours are spent.

        Raises:
            UsageError: the plan's result can't be healed, or a run of another kind is unfinished in the same place.
        """
        self.settings.check(self.planned.plan)
        if self.options.join:
            raise UsageError("--heal can't be used with --join: only one process trains.", "Leave one of them out.")
        self.options.check(self.planned.plan.request)
        if self.finished:
            return
        check_out(self.out, self.settings.overwrite, self.planned.source.path)
        unfinished = RunFolder(self.out).path
        if unfinished.exists() and not self.settings.overwrite and not self._is_ours(unfinished):
            raise UsageError(
                f"{unfinished} holds an unfinished training of something else.",
                f"Finish it, or add --overwrite (or delete {unfinished}) to start this one.",
            )

    @property
    def finished(self) -> bool:
        """Whether an earlier run wrote the healed model, and was stopped before it had removed the converted one."""
        stages = _stages(self.out)[-2:]
        if len(stages) < 2 or not self.converted.is_dir():
            return False
        made = stages[0].get("plan") == self.planned.plan.digest and "recipe" in stages[1]
        return made and recorded(Recipe.model_validate(stages[1]["recipe"])) == recorded(self.recipe)

    def convert(self, events: Events = Events()) -> Conversion:
        """Convert, or return what an earlier run converted. Parameters and errors are those of `convert`.

        Raises:
            UsageError: another run heals in the same place.
        """
        if self.finished or self._stands():
            return _of_earlier_run(self.planned, self.converted)
        unfinished = RunFolder(self.out)
        if unfinished.path.exists():
            unfinished.discard()  # its weights are not those of this conversion; `check` has allowed it
        return run_plan(self.planned, self.converted, overwrite=True, options=self.options, events=events)

    def train(self, events: Events = Events()) -> TrainingResult | None:
        """Heal the converted model and write OUT; return None where an earlier run has done so.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the run is saved, and the same call goes on.
            UptrainError: as `train`.
        """
        from uptrain.training.run import train

        done, unfinished = None, RunFolder(self.out).path
        ours = self._is_ours(unfinished)
        if not self.finished:
            done = train(self.recipe, restart=self.settings.overwrite and not ours, events=events)
        with friendly_errors(self.out):
            if unfinished.exists() and ours:
                remove(unfinished)
            remove(self.converted)
        return done

    def _stands(self) -> bool:
        """Say whether an earlier run has converted the model by this plan."""
        return any(stage.get("plan") == self.planned.plan.digest for stage in _stages(self.converted)[-1:])

    def _is_ours(self, run_folder: Path) -> bool:
        """Say whether an unfinished training heals what stands converted, by the same recipe."""
        if not self._stands():
            return False
        try:
            earlier = read_json(run_folder / "recipe.json")
        except (CheckpointError, OSError):
            return False
        ours = recorded(self.recipe)
        return all(earlier.get(key) == ours[key] for key in ours.keys() & earlier.keys())


def convert_and_heal(
    model: str,
    heal: HealSettings,
    out: str | Path | None = None,
    request: Request | None = None,
    *,
    options: RunOptions = RunOptions(),
    events: Events = Events(),
) -> Healed:
    """Convert `model`, heal the result on the calibration text, and write it to `out`, whole or not at all.

    - `model`: a folder, `demo` or a Hub id.
    - `heal`: how to heal.
    - `out`: the folder of the healed model; None for a name made of the model's and the target's.
    - `request`: the target, and a method that needs text; None for `Request(method="calibrated")`.
    - `options`: how the conversion runs.
    - `events`: receives `bytes`, `layer` and `note` of the conversion, and `step` of the healing.

    Raises:
        UptrainError: as `convert` and `train`.
        Interrupted: stopped by Ctrl-C; the same call goes on where it stopped.
    """
    planned = plan_conversion(model, request or Request(method="calibrated"))
    folder = Path(out) if out is not None else default_out(planned.source, planned.plan)
    healing = Healing(planned=planned, out=folder, settings=heal, options=options)
    healing.check()
    conversion = healing.convert(events)
    training = healing.train(events)
    return Healed(conversion=replace(conversion, out=folder), training=training)


def _of_earlier_run(planned: Planned, folder: Path) -> Conversion:
    from uptrain.conversion.run.prepare import sidecars

    source, checkpoint, plan = planned
    return Conversion(
        out=folder, source=source, plan=plan, resumed=tuple(plan.shards), energy=energy_in(folder),
        sidecars=sidecars(source, checkpoint),
    )  # fmt: skip


def _stages(folder: Path) -> list[dict[str, object]]:
    try:
        manifest = read_manifest(folder)
    except CheckpointError:  # not ours, or about to be replaced
        return []
    return manifest["stages"] if manifest else []
