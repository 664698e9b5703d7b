"""The text of one row: what its field holds, or a conversation as the tokenizer's chat template writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uptrain.data.chat import Render
from uptrain.data.sources import Dataset, Files
from uptrain.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class RowText:
    """How the rows of a source become text.

    - `source`: names the field that holds the text or the conversation.
    - `render`: writes a conversation as text; None where no tokenizer was given.
    """

    source: Files | Dataset
    render: Render | None = None

    @property
    def field(self) -> str:
        """Return the field that is read."""
        return self.source.chat_field or self.source.text_field

    def text_of(self, row: Any, where: str) -> str:
        """Return the text of a row; `where` names the row in errors.

        Raises:
            UsageError: the field holds neither text nor the messages that it should hold, or the chat template
                refuses them.
        """
        value = row.get(self.field) if isinstance(row, dict) else None
        if self.source.chat_field is None:
            if isinstance(value, str):
                return value
            raise no_field(row, self.field, where, "text", "text_field")
        messages = messages_of(value)
        if messages is None:
            raise no_field(row, self.field, where, "messages with role and content", "chat_field")
        if self.render is None:
            raise UsageError("A source with chat_field needs a tokenizer that has a chat template.")
        try:
            return self.render(messages)
        except UsageError as error:
            raise UsageError(f"{where} can't be written as text. {error.message}", error.hint) from None


def messages_of(value: Any) -> list[dict[str, Any]] | None:
    """Return the messages in a row's value, or None where the value is not a conversation."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return None
    for message in value:
        if not isinstance(message, Mapping):
            return None
        if not (isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            return None
    # A table gives each message every column. A template would read an empty column as a value, so it is removed.
    return [{key: part for key, part in message.items() if part is not None} for message in value]


def chat_field_of(row: Any, text_field: str) -> str | None:
    """Return the first field of a row that holds a conversation; None where `text_field` holds text, or none does."""
    if not isinstance(row, dict) or isinstance(row.get(text_field), str):
        return None
    return next((str(name) for name, value in row.items() if messages_of(value) is not None), None)


def no_field(row: Any, field: str, where: str, wanted: str, option: str) -> UsageError:
    """Return the error for a row without the wanted content.

    - `row`: the row.
    - `field`: the name of the field.
    - `where`: the row's place in its file.
    - `wanted`: what the field should hold.
    - `option`: the key of the recipe that names the field.
    """
    keys = list(row) if isinstance(row, dict) else []
    if field in keys:
        return UsageError(f"{where} has no {wanted} in its field {field!r}, but {_shown(row[field])}.")
    hint = f"{did_you_mean(field, keys)} It has {', '.join(map(str, keys)) or 'none'}; set {option}.".strip()
    return UsageError(f"{where} has no {wanted} in a field {field!r}.", hint)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
