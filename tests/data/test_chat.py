"""A conversation becomes the text that its model's chat template writes, from every kind of source, on any day."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.corpus import tokenizer
from uptrain.data.row_text import messages_of
from uptrain.data.sources import Dataset, Files, TextSource
from uptrain.data.text_encoder import TextEncoder
from uptrain.data.token_stream import TokenStream
from uptrain.data.token_text import read_tokens
from uptrain.errors import UptrainError, UsageError

TEMPLATE = (
    "{{ strftime_now('%Y') }}\n{% for m in messages %}"
    "{% if m.role not in ('user', 'assistant') %}{{ raise_exception('who is ' + m.role + '?') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% if m.tool is defined %}[{{ m.tool }}]{% endif %}</{{ m.role }}>{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "quick fox?"}, {"role": "assistant", "content": "lazy dog.", "tool": "tea"}],
    [{"role": "user", "content": "naïve 🦊"}],
]
WRITTEN = ["2024\n<user>quick fox?</user><assistant>lazy dog.[tea]</assistant>", "2024\n<user>naïve 🦊</user>"]


@pytest.fixture
def words() -> Any:
    found = tokenizer()
    found.chat_template = TEMPLATE
    return found


def jsonl(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sources(tmp_path: Path) -> dict[str, TextSource]:
    jsonl(tmp_path / "rows/a.jsonl", *({"messages": chat} for chat in CHATS))
    parquet.write_table(pa.table({"text": ["x", "y"], "messages": CHATS}), tmp_path / "a.parquet")
    return {
        "jsonl": Files(files=str(tmp_path / "rows/a.jsonl"), chat_field="messages"),
        "parquet": Files(files=str(tmp_path / "a.parquet"), chat_field="messages"),
        "dataset": Dataset(dataset=str(tmp_path / "rows"), chat_field="messages"),
    }


def oracle(words: Any) -> list[int]:
    first, second = (words.backend_tokenizer.encode(text).ids for text in WRITTEN)
    return [*first, words.eos_token_id, *second]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_a_conversation_is_what_the_template_writes(tmp_path: Path, words: Any, kind: str) -> None:
    found = read_tokens([sources(tmp_path)[kind]], words, 10**6)
    assert found.ids.tolist() == oracle(words)
    assert found.bytes == sum(len(text.encode()) for text in [*WRITTEN, words.eos_token]) - len(words.eos_token)


def test_a_key_that_only_other_rows_have_is_not_there() -> None:
    assert messages_of([{"role": "user", "content": "tea?", "tool": None}]) == [{"role": "user", "content": "tea?"}]


def test_a_stream_of_conversations_is_the_same_tokens(tmp_path: Path, words: Any) -> None:
    sources(tmp_path)
    stream = TokenStream(
        Dataset(dataset=str(tmp_path / "rows"), chat_field="messages", stream=True), TextEncoder(words), 8
    )
    ids = oracle(words)
    assert stream.take(len(ids) // 8).ravel().tolist() == ids[: len(ids) // 8 * 8]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_a_tokenizer_without_a_template_is_one_sentence(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError, match="chat template"):
        read_tokens([sources(tmp_path)[kind]], tokenizer(), 100)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": "hello"}, "line 1\\b.*'messages'.*\"hello\""),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": []}, r"\[\]"),
        ({"conversation": CHATS[0]}, "conversation.*chat_field"),
        ({"messages": [{"role": "x", "content": ""}]}, "a.jsonl, line 1.* who is x?"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(tmp_path: Path, words: Any, row: Any, said: str) -> None:
    path = jsonl(tmp_path / "rows/a.jsonl", row)
    with pytest.raises(UsageError, match=said):
        read_tokens([Files(files=str(path), chat_field="messages")], words, 100)
    with pytest.raises(UptrainError, match=r"The dataset .* (has no messages|can't be written as text)"):
        TokenStream(Dataset(dataset=str(path.parent), chat_field="messages", stream=True), TextEncoder(words), 8).take(
            1
        )


def test_plain_text_has_no_conversations(tmp_path: Path, words: Any) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UsageError, match=r"a\.txt.*chat_field"):
        read_tokens([Files(files=str(tmp_path / "a.txt"), chat_field="messages")], words, 100)
