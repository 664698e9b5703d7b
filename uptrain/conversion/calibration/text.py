"""The text of a calibration: read in blocks of tokens, shared by conversions of one source, and described."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from uptrain.checkpoint.checksum import Checksum
from uptrain.checkpoint.events import Events
from uptrain.conversion.calibration.activation_cache import ActivationCache
from uptrain.data.weighted_texts import TextBlocks, read_blocks, weighted_texts
from uptrain.errors import UsageError
from uptrain.models import loading

if TYPE_CHECKING:
    from uptrain.conversion.plan.planner import Plan

OPTION = "--calibrate"
BLOCK = 1024
"""Tokens of a calibration block, where the model's positions allow it."""
STRANGE = 0.6
"""Tokens per byte from which text is probably of a script or kind the tokenizer was not made for."""
FAR = 2.0
"""How many times the least error a text's error is, from which it is named."""


class SharedCalibration:
    """What calibrations of one source on one text share: the tokens, and the activations of the source's layers."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._text: TextBlocks | None = None
        self.cache = ActivationCache()

    def text(self, plan: Plan) -> TextBlocks:
        """Return the blocks of the plan's text, read once; another source or text begins again. Raises as below."""
        request = plan.request
        key = (plan.source.checkpoint.path, request.chosen_text, request.chosen_tokens, block_size(plan))
        if self._text is None or key != self._key:
            self._key, self._text = key, calibration_text(plan)
            self.cache = ActivationCache()
        return self._text


def calibration_text(plan: Plan) -> TextBlocks:
    """Read the texts that `--calibrate` names, in blocks of the source's own tokens.

    Raises:
        UsageError: it names no text, a text is empty or binary, or one gives less than two blocks.
    """
    texts = weighted_texts(OPTION, plan.request.chosen_text)
    tokenizer = loading.load_tokenizer(plan.source.checkpoint.path)
    return read_blocks(OPTION, texts, tokenizer, plan.request.chosen_tokens, block_size(plan))


def block_size(plan: Plan) -> int:
    """Return the tokens of a block: those of `--calibration-block`, or 1,024, or as many as the model's positions.

    Raises:
        UsageError: `--calibration-block` asks for more than the model has positions for.
    """
    longest = plan.source.config.get(plan.source.family.keys.max_position_embeddings)
    wanted = plan.request.calibration_block
    if wanted is None:
        return min(BLOCK, longest if isinstance(longest, int) else BLOCK)
    if isinstance(longest, int) and wanted > longest:
        raise UsageError(
            f"--calibration-block {wanted} is longer than the {longest} positions of {plan.source.name}.",
            f"Give at most {longest}.",
        )
    return wanted


def note_strange(text: TextBlocks, events: Events) -> None:
    """Say which texts take many tokens, and which are shorter than their share."""
    for read in text.texts:
        if read.tokens_per_byte > STRANGE:
            name = "The calibration text" if len(text.texts) == 1 else f"The calibration text {read.text.name}"
            events.note(
                f"{name} takes {read.tokens_per_byte:.2f} tokens per byte: it may be of a script or kind this model "
                "was not trained on, and fit it badly."
            )
    for name in text.short:
        events.note(f"The calibration text {name} is shorter than its share; the other texts have what it lacks.")


def described(plan: Plan, text: TextBlocks) -> dict[str, Any]:
    """Return what uptrain.json records of the text, and by what an unfinished run is known."""
    digest = Checksum()
    digest.update(text.ids.tobytes())
    found = {"name": plan.request.chosen_text, "tokens": int(text.ids.size), "token_digest": digest.text()}
    if len(text.texts) > 1:
        size = text.ids.shape[1]
        found["texts"] = [
            {"name": read.text.name, "weight": read.text.weight, "tokens": read.blocks * size} for read in text.texts
        ]
    return found


def note_errors(text: TextBlocks, errors: Sequence[float], events: Events) -> None:
    """Say how far the last layer's output is from the source's on the held-out blocks of each text."""
    if len(errors) < 2:
        return
    names = [read.text.name for read in text.texts]
    shown = ", ".join(f"{name} {error:.2%}" for name, error in zip(names, errors, strict=True))
    events.note(f"Error of the last layer's output on held-out blocks: {shown}.")
    least = min(errors)
    for name, error in zip(names, errors, strict=True):
        if error > FAR * least > 0:
            events.note(f"{name} errs {error / least:.1f} times as much as the best text. Give it more weight or text.")
