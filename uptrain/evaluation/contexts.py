"""How many tokens one pass of a model reads: the contexts that were asked for, or defaults that fit the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from uptrain.errors import UsageError

CONTEXT = 1024
"""Default window of a quality measurement, in tokens."""
SPEED_CONTEXT = 512
"""Default number of tokens before decoding is timed."""


@dataclass(frozen=True, kw_only=True)
class PositionLimit:
    """How many positions there are for a context.

    - `positions`: how many positions the model has.
    - `name`: the model's name, for messages.
    - `reserved`: how many of the positions are for the tokens after the context.
    """

    positions: int
    name: str
    reserved: int = 0

    @property
    def longest(self) -> int:
        """Return the longest context that fits, in tokens."""
        return self.positions - self.reserved


def choose_contexts(
    option: str,
    asked: tuple[int, ...],
    default: int,
    limit: PositionLimit,
    on_note: Callable[[str], None] = lambda text: None,
) -> list[int]:
    """Return the contexts that the user asked for, or the default, shortened to what fits.

    - `option`: the command-line option that names contexts, for messages.
    - `asked`: contexts in tokens; empty where the user gave none.
    - `default`: the context in tokens where the user gave none.
    - `limit`: how many positions the model has.
    - `on_note`: called with a sentence when the default is shortened.

    Raises:
        UsageError: the model has too few positions for a context that the user asked for.
    """
    if not asked:
        if default > limit.longest:
            on_note(
                f"{option} is {max(1, limit.longest)}, not {default}: {limit.name} has {limit.positions} positions."
            )
        return [max(1, min(default, limit.longest))]
    if max(asked) > limit.longest:
        reserved = f", {limit.reserved} of them for the tokens after the context" if limit.reserved else ""
        raise UsageError(
            f"{option} {max(asked)} is too long: {limit.name} has {limit.positions} positions{reserved}.",
            f"Use at most {max(limit.longest, 0)}.",
        )
    return list(asked)


def check_stride(stride: int | None, context: int, encoder: bool = False) -> None:
    """Refuse a stride that leaves tokens unscored, or an encoder nothing to read.

    Raises:
        UsageError: the stride is longer than the context, or equal to it where there is an encoder.
    """
    if encoder and stride == context:
        raise UsageError(
            f"stride {stride} leaves nothing of the context of {context} tokens for the encoder to read.",
            "Use a smaller --stride; the default is half of the context.",
        )
    if stride is not None and not 1 <= stride <= context:
        raise UsageError(
            f"stride {stride} must lie between 1 and the context of {context} tokens.", "Use another --stride."
        )
