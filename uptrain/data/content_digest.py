"""A digest of what tokens depend on: the content of the text and of the tokenizer, not their names and dates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from uptrain.checkpoint.checksum import Checksum, checksum_file
from uptrain.data.chat import template_of
from uptrain.data.dataset_rows import open_dataset
from uptrain.data.sources import Builtin, Dataset, Files, TeacherText, TextSource, has_chats
from uptrain.data.text_encoder import TextEncoder
from uptrain.data.text_files import files_of, has_rows
from uptrain.errors import UsageError

_VERSION = 1
"""Raise this number when a change of code turns the same content into different tokens."""


def content_digest(sources: Sequence[TextSource], encoder: TextEncoder) -> str:
    """Return a hex digest that changes whenever the sources' tokens might change.

    Raises:
        UsageError: a source can't be found.
        CheckpointError: a file can't be read.
    """
    chat = template_of(encoder.tokenizer) if any(map(has_chats, sources)) else None
    content = [_VERSION, [_source(source) for source in sources], encoder.digest, chat]
    return _digest(json.dumps(content).encode()).partition(":")[2]


def _source(source: TextSource) -> Any:
    if isinstance(source, Files):
        fields = [source.text_field, source.chat_field]
        # Of a file's name, only the ending matters: it says whether the file has rows.
        return [[checksum_file(path), *(fields if has_rows(path) else [])] for path in files_of(source)]
    if isinstance(source, TeacherText):
        raise UsageError("The teacher's text has no digest before it is written.")
    if isinstance(source, Dataset) and source.stream:
        # A stream is not read before it is used, so its name replaces its content.
        return source.model_dump(mode="json", exclude={"weight"})
    if isinstance(source, Dataset):
        return [open_dataset(source)._fingerprint, source.text_field, source.chat_field]
    return _builtin(source)


def _builtin(source: Builtin) -> str:
    from uptrain.data.stdlib_text import documents

    # Linux distributions change the library without changing Python's version, so only the text identifies it.
    checksum = Checksum()
    for text in documents(source.split):
        checksum.update(_digest(text.encode()).encode())
    return checksum.text()


def _digest(data: bytes) -> str:
    checksum = Checksum()
    checksum.update(data)
    return checksum.text()
