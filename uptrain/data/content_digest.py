"""What tokens are made of, as a digest: the text's content and the tokenizer's, whatever their names and times."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uptrain.checkpoint.checksum import Checksum, checksum_file
from uptrain.data.chat import template_of
from uptrain.data.documents import files_of, open_dataset
from uptrain.data.sources import Builtin, Dataset, Files, TeacherText, TextSource, has_chats
from uptrain.data.text_files import has_rows
from uptrain.data.token_text import separator_of
from uptrain.errors import UsageError

_VERSION = 1
"""To be raised when the same content becomes other tokens."""


def content_digest(sources: Sequence[TextSource], tokenizer: Any) -> str:
    """Return a hex digest that is another one whenever the sources' tokens might be.

    Raises:
        UsageError: a source can't be found.
        CheckpointError: a file can't be read.
    """
    chat = template_of(tokenizer) if any(map(has_chats, sources)) else None
    content = [_VERSION, [_source(source) for source in sources], tokenizer_digest(tokenizer), chat]
    return _digest(json.dumps(content).encode()).partition(":")[2]


def _source(source: TextSource) -> Any:
    if isinstance(source, Files):
        fields = [source.text_field, source.chat_field]
        # A file's name says whether it has rows, and nothing else that counts.
        return [[checksum_file(path), *(fields if has_rows(path) else [])] for path in files_of(source)]
    if isinstance(source, TeacherText):
        raise UsageError("What the teacher writes is not known before it is written.")
    if isinstance(source, Dataset) and source.stream:
        # It is not read until it is used, so its name has to do.
        return source.model_dump(mode="json", exclude={"weight"})
    if isinstance(source, Dataset):
        return [open_dataset(source)._fingerprint, source.text_field, source.chat_field]
    return _builtin(source)


def _builtin(source: Builtin) -> str:
    from uptrain.data.stdlib_text import documents

    # Distributions change the library without changing Python's version, so only its text tells.
    checksum = Checksum()
    for text in documents(source.split):
        checksum.update(_digest(text.encode()).encode())
    return checksum.text()


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of how the tokenizer makes tokens of text, its chat template aside."""
    content: list[Any] = [type(tokenizer).__name__, len(tokenizer), separator_of(tokenizer)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Calls change these two, and tokenizing a corpus uses neither.
        content.append({key: value for key, value in json.loads(backend.to_str()).items() if key not in _CALL_STATE})
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            content.append([[path.name, checksum_file(path)] for path in files])
    return _digest(json.dumps(content).encode())


_CALL_STATE = ("truncation", "padding")


def _digest(data: bytes) -> str:
    checksum = Checksum()
    checksum.update(data)
    return checksum.text()
