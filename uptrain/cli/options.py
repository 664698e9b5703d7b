"""Options that several commands share, and checks of options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from uptrain.conversion.calibration_quality import quality_help
from uptrain.errors import UsageError
from uptrain.models import devices

if TYPE_CHECKING:
    from uptrain.data.sources import TextSource

Command = TypeVar("Command", bound=Callable[..., Any])


def examples(*commands: str) -> str:
    """Return the end of a command's help: commands that show how it is used."""
    return "\n".join(("\b", "Examples:", *(f"  {command}" for command in commands)))


def source_options(command: Command) -> Command:
    """Add --revision and --allow-pickle to a command that reads a checkpoint."""
    command = click.option("--revision", help="Branch, tag or commit of a Hub id.")(command)
    return click.option(
        "--allow-pickle",
        is_flag=True,
        help="Also read .bin weights, with restricted unpickling. Use it only for models that you trust.",
    )(command)


def _use(context: click.Context, _parameter: click.Parameter, name: str | None) -> None:
    context.with_resource(devices.using(name))


def device_option(command: Command) -> Command:
    """Add --device to a command that computes. The device is in use until the command ends."""
    return click.option(
        "--device", metavar="NAME", expose_value=False, callback=_use, help="Device that computes: auto, cpu, cuda, "
        "cuda:1, mps, or another device of torch. Default: that of ACCELERATE_USE_CPU or ACCELERATE_TORCH_DEVICE, else "
        "auto, which is the accelerator if there is one.",
    )(command)  # fmt: skip


def window_options(command: Command) -> Command:
    """Add --stride and --tokens to a command that scores text."""
    command = click.option(
        "--tokens", type=click.IntRange(2), default=32_768, show_default=True, help="Number of tokens to read of each "
        "text.",
    )(command)  # fmt: skip
    return click.option(
        "--stride", type=click.IntRange(1), help="Tokens by which the window moves. Default: half of --context."
    )(command)


quality_dtype_option = click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Dtype in which quality is computed. "
    "Default: float32 on a CPU, elsewhere that of MODEL.",
)  # fmt: skip
"""Add --dtype to a command that scores text."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
"""Add --json to a command that prints a result."""


def calibration_text_options(owner: str) -> Callable[[Command], Command]:
    """Return what adds the options of the calibration text to a command; `owner` says in help what they belong to."""

    def add(command: Command) -> Command:
        options = (
            click.option(
                "--calibrate", multiple=True, metavar="TEXT[:WEIGHT]", callback=_joined, help=f"({owner}) Calibration "
                "text: a file, a glob, a dataset, or builtin (default). Repeatable, or separated by commas: "
                "en.txt:2,zh.txt:1 shares the tokens out by weight.",
            ),
            click.option(
                "--quality", help=f"({owner}) How much calibration reads and tries. {quality_help()}. The next options "
                "win over it.",
            ),
            click.option(
                "--calibration-tokens", type=int, help=f"({owner}) Number of tokens of all texts. Default: --quality's."
            ),
            click.option(
                "--calibration-block", type=int, help=f"({owner}) Tokens of a calibration block. Default: 1024, or "
                "MODEL's maximum if that is shorter.",
            ),
        )  # fmt: skip
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _joined(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> str | None:
    return ",".join(values) if values else None  # an empty text is an error, not none at all


def check_device(computes: bool) -> None:
    """Refuse --device if the command computes nothing on a device.

    Raises:
        UsageError: --device was given.
    """
    if devices.chosen() is not None and not computes:
        raise UsageError(
            f"--device {devices.chosen()} has no effect: only a calibration runs MODEL.",
            "Leave it out, or add --calibrate TEXT.",
        )


def texts_of(names: Sequence[str]) -> list[TextSource]:
    """Return the text source of each --text. Without any: the held-out part of the standard library.

    Raises:
        UsageError: one of them is not a text.
    """
    from uptrain.data.documents import with_row_fields
    from uptrain.data.sources import HELD_OUT, text_of_option

    return [with_row_fields(text_of_option("--text", name)) for name in names] or [HELD_OUT]


def check_belongs(names: Sequence[str], owner: str, there: bool) -> None:
    """Refuse options that have no effect without another option.

    - `names`: the parameters' names.
    - `owner`: the option that they need, as it is typed.
    - `there`: whether that option was given.

    Raises:
        UsageError: one of `names` was given, and `owner` was not.
    """
    context = click.get_current_context()
    options = {param.name: param.opts[0] for param in context.command.params}
    for name in names:
        if not there and context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise UsageError(f"{options[name]} has no effect without {owner}.", f"Add {owner}, or leave it out.")
