"""How many tokens a model is shown at once: what was asked for, where the model has positions for it, or a default."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from uptrain.errors import UsageError

CONTEXT = 1024
"""The window of a quality measurement where none is asked for."""
SPEED_CONTEXT = 512
"""The tokens before decoding is timed, likewise."""


def chosen_contexts(
    option: str,
    asked: int | Sequence[int] | None,
    default: int,
    longest: int,
    name: str,
    *,
    beside: int = 0,
    on_note: Callable[[str], None] = lambda text: None,
) -> list[int]:
    """Return the contexts that were `asked` for, or the `default`, shortened if need be and said so.

    Args:
        option: what the user would write, for a message.
        asked: tokens, one number or several; None where none were asked for.
        default: tokens where none were asked for.
        longest: how many positions the model has.
        name: whose positions those are.
        beside: tokens that come after the context and need positions too.
        on_note: hears that the default was shortened.

    Raises:
        UsageError: the model has no positions for what was asked.
    """
    room = longest - beside
    more = f" beside the {beside} that follow" if beside else ""
    if asked is None:
        if default > room:
            on_note(f"{option} is {max(1, room)}, not {default}: {name} has {longest} positions.")
        return [max(1, min(default, room))]
    listed = [asked] if isinstance(asked, int) else list(dict.fromkeys(asked))
    if max(listed) > room:
        raise UsageError(
            f"{option} {max(listed)} is more than {name} takes: it has {longest} positions{more}.",
            f"Use at most {max(room, 0)}.",
        )
    return listed


def check_stride(stride: int | None, context: int, encoder: bool = False) -> None:
    """Refuse a stride that leaves tokens unscored, or an encoder nothing to read.

    Raises:
        UsageError: as said.
    """
    if encoder and stride == context:
        raise UsageError(
            f"stride {stride} leaves nothing of the context of {context} tokens for the encoder to read.",
            "Give a smaller one; half is the default.",
        )
    if stride is not None and not 1 <= stride <= context:
        raise UsageError(f"stride {stride} must lie between 1 and the context of {context} tokens.")
