"""Conversations as text, written by the tokenizer's chat template and independent of today's date."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from uptrain.errors import UsageError

Render = Callable[[list[dict[str, Any]]], str]
"""Writes a conversation as text. A conversation is a list of messages with role and content."""
_DATE = {"%d": "26", "%-d": "26", "%B": "July", "%b": "Jul", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday",
         "%a": "Fri", "%H": "12", "%I": "12", "%p": "PM", "%M": "00", "%S": "00", "%F": "2024-07-26"}  # fmt: skip


def template_of(tokenizer: Any) -> str:
    """Return the tokenizer's default chat template.

    Raises:
        UsageError: the tokenizer has no chat template.
    """
    try:
        return str(tokenizer.get_chat_template())
    except (ValueError, AttributeError):
        raise UsageError(
            "The tokenizer has no chat template, and a source with chat_field needs one.",
            "Use an instruct model's tokenizer, or text_field.",
        ) from None


def renderer(tokenizer: Any) -> Render:
    """Return a function that writes a conversation with the tokenizer's chat template.

    Raises:
        UsageError: the tokenizer has no template. The function raises it where the template refuses a conversation.
    """
    import jinja2

    template = _same_on_every_day(template_of(tokenizer))

    def render(messages: list[dict[str, Any]]) -> str:
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UsageError(f"The tokenizer's chat template refuses a conversation: {reason}.") from None
        return str(text)

    return render


def _same_on_every_day(template: str) -> str:
    # Some templates write today's date into the system prompt, but a run's text must not depend on the date.
    # transformers passes only plain data to a template, so strftime_now is replaced by a macro and not by a function.
    if "strftime_now" not in template:
        return template
    replaced = "".join(f".replace('{code}', '{value}')" for code, value in _DATE.items())
    return "{%- macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro +%}" + template
