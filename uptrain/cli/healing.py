"""Healing at the command line: what `uptrain convert --heal` says before, while and after it trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from uptrain.cli import console
from uptrain.formatting import counted, duration, size

if TYPE_CHECKING:
    from uptrain.conversion.run.options import RunOptions
    from uptrain.conversion.run.prepare import Planned
    from uptrain.workflows.healing.run import Healing


def planned_healing(planned: Planned, out: Path, tokens: int, overwrite: bool, options: RunOptions) -> Healing:
    """Return the healing of a planned conversion, and say what it will take.

    - `planned`: the conversion.
    - `out`: the folder of the healed model.
    - `tokens`: how many tokens to train on.
    - `overwrite`: replace `out` if it exists.
    - `options`: how the conversion runs.

    Raises:
        UsageError: the plan's result can't be healed.
    """
    from uptrain.workflows.healing.estimate import HealEstimate
    from uptrain.workflows.healing.run import Healing
    from uptrain.workflows.healing.settings import HealSettings

    settings = HealSettings(tokens=tokens, overwrite=overwrite)
    settings.check(planned.plan)
    healing = Healing(planned=planned, out=out, settings=settings, options=options)
    recipe, estimate = healing.recipe, HealEstimate.of(planned.plan, healing.recipe)
    console.note(
        f"Healing will take {counted(recipe.total_steps, 'step')} of {recipe.tokens_per_step:,} tokens after the "
        f"conversion: about {duration(estimate.seconds)}, and {size(estimate.memory)} for weights and the optimizer."
    )
    return healing


def heal(healing: Healing) -> list[tuple[str, str]]:
    """Train, showing progress; return what to print of it."""
    from uptrain.checkpoint.events import Events

    recipe = healing.recipe
    with console.training_progress(recipe.total_steps) as show:
        done = healing.train(Events(step=show))
    if done is None:
        return [("healed", "by an earlier run")]
    amount = f"{counted(done.tokens, 'token')} in {counted(done.steps, 'step')}"
    return [("healed", f"on {amount}, to {done.loss:.4f} nats per token from the source at the last step")]
