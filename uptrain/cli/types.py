"""Kinds of values that options take."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from uptrain.errors import UsageError
from uptrain.models import devices

if TYPE_CHECKING:
    from uptrain.data.sources import TextSource


Command = TypeVar("Command", bound=Callable[..., Any])


def _use(context: click.Context, _parameter: click.Parameter, name: str | None) -> None:
    context.with_resource(devices.using(name))


def device_option(command: Command) -> Command:
    """Add --device to a command that computes: it counts for as long as the command runs."""
    return click.option(
        "--device", metavar="NAME", expose_value=False, callback=_use, help="Compute there: auto, cpu, cuda, cuda:1, "
        "mps, or another device of torch. Default: what ACCELERATE_USE_CPU or ACCELERATE_TORCH_DEVICE says, else auto: "
        "the accelerator, if there is one.",
    )(command)  # fmt: skip


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


class Size(click.ParamType[int]):
    """A number of bytes: 5GB, 500MB, 2GiB or 800B."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes that a text such as 5GB means."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)\s*", str(value), re.IGNORECASE)
        if not match and str(value).strip().isdigit():
            self.fail(f"{value!r} has no unit. Write it like 5GB, 500MB or, in bytes, {value.strip()}B.", param, ctx)
        if not match:
            self.fail(f"{value!r} is not a size. Write it like 5GB, 500MB or 2GiB.", param, ctx)
        number, unit, binary = match.groups()
        power = " kmgt".index(unit.lower()) if unit else 0
        return int(float(number) * (1024 if binary else 1000) ** power)


class Share(click.ParamType[float]):
    """A share: 25% or 0.25."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the share that a text such as 25% means."""
        match = re.fullmatch(r"\s*(\d*\.?\d+)\s*(%?)\s*", str(value))
        if not match:
            self.fail(f"{value!r} is not a share. Write it like 25%.", param, ctx)
        return float(match[1]) / (100 if match[2] else 1)


class Sizes(click.ParamType[tuple[int, ...]]):
    """Whole numbers between commas, each at least `least` and at most `most`: 512,1024."""

    name = "sizes"

    def __init__(self, least: int, most: int = 2**31) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the numbers that a text such as 512,1024 lists."""
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(int(each) for each in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers. Write it like 512,1024.", param, ctx)
        if min(sizes) < self.least:
            self.fail(f"{min(sizes)} is less than {self.least}.", param, ctx)
        if max(sizes) > self.most:
            self.fail(f"{max(sizes)} is more than {self.most}.", param, ctx)
        return sizes


class Words(click.ParamType[list[str]]):
    """Words with commas between them."""

    name = "words"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """Return the words of a text such as mean,svd."""
        if isinstance(value, list):
            return value
        return [word.strip() for word in str(value).split(",") if word.strip()]


def texts_of(names: Sequence[str]) -> list[TextSource]:
    """Return what each --text names, and without one the held-out text that is here.

    Raises:
        UsageError: one of them names no text.
    """
    from uptrain.data.sources import HELD_OUT, parse_source

    try:
        return [parse_source(name) for name in names] or [HELD_OUT]
    except ValueError:
        raise UsageError(f"--text {' '.join(names)} is not a text.", "Name a file, a glob or a dataset.") from None


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
