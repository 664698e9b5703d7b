"""Types of option values."""

from __future__ import annotations

import re
from typing import Any

import click


class Size(click.ParamType[int]):
    """A number of bytes: 5GB, 500MB, 2GiB or 800B."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes of a text such as 5GB."""
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
        """Return the share of a text such as 25%."""
        match = re.fullmatch(r"\s*(\d*\.?\d+)\s*(%?)\s*", str(value))
        if not match:
            self.fail(f"{value!r} is not a share. Write it like 25%.", param, ctx)
        return float(match[1]) / (100 if match[2] else 1)


class Sizes(click.ParamType[tuple[int, ...]]):
    """Whole numbers separated by commas, such as 512,1024, each from `least` to `most`."""

    name = "sizes"

    def __init__(self, least: int, most: int = 2**31) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the numbers of a text such as 512,1024."""
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(int(each) for each in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers. Write it like 512,1024.", param, ctx)
        if min(sizes) < self.least:
            self.fail(f"{min(sizes)} is less than {self.least}.", param, ctx)
        if max(sizes) > self.most:
            self.fail(f"{max(sizes)} is more than {self.most}.", param, ctx)
        return sizes


class Names(click.ParamType[list[str]]):
    """Names separated by commas."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """Return the names of a text such as mean,svd."""
        if isinstance(value, list):
            return value
        return [word.strip() for word in str(value).split(",") if word.strip()]
