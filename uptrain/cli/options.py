"""Options that several commands share, and the checks of what was typed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from uptrain.errors import UsageError
from uptrain.models import devices

if TYPE_CHECKING:
    from uptrain.data.sources import TextSource

Command = TypeVar("Command", bound=Callable[..., Any])


def source_options(command: Command) -> Command:
    """Add --revision and --allow-pickle to a command that reads a checkpoint."""
    command = click.option("--revision", help="Branch, tag or commit, for a Hub id.")(command)
    return click.option(
        "--allow-pickle",
        is_flag=True,
        help="Also read .bin weights (restricted unpickling). Only if you trust them.",
    )(command)


def _use(context: click.Context, _parameter: click.Parameter, name: str | None) -> None:
    context.with_resource(devices.using(name))


def device_option(command: Command) -> Command:
    """Add --device to a command that computes: it counts for as long as the command runs."""
    return click.option(
        "--device", metavar="NAME", expose_value=False, callback=_use, help="Compute there: auto, cpu, cuda, cuda:1, "
        "mps, or another device of torch. Default: what ACCELERATE_USE_CPU or ACCELERATE_TORCH_DEVICE says, else auto: "
        "the accelerator, if there is one.",
    )(command)  # fmt: skip


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
"""Add --json to a command that has a result."""


def check_device(computes: bool) -> None:
    """Refuse --device where nothing is computed on a device.

    Raises:
        UsageError: it was given all the same.
    """
    if devices.chosen() is not None and not computes:
        raise UsageError(
            f"--device {devices.chosen()} has no effect here: only a calibration computes with MODEL.",
            "Leave it out, or add --calibrate or --method calibrated.",
        )


def texts_of(names: Sequence[str]) -> list[TextSource]:
    """Return what each --text names, and without one the held-out text that is here.

    Raises:
        UsageError: one of them names no text.
    """
    from uptrain.data.sources import HELD_OUT, text_of_option

    return [text_of_option("--text", name) for name in names] or [HELD_OUT]


def check_belongs(names: Sequence[str], owner: str, there: bool) -> None:
    """Refuse options that were typed although what they belong to, `owner`, isn't `there`.

    Raises:
        UsageError: one was.
    """
    context = click.get_current_context()
    options = {param.name: param.opts[0] for param in context.command.params}
    for name in names:
        if not there and context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise UsageError(f"{options[name]} has no effect without {owner}.", f"Add {owner}, or leave it out.")
