"""Runs on the same text share its tokens; other text, fields, tokenizer or template never get them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.corpus import corpus, tokenizer
from uptrain.data import token_cache
from uptrain.data.content_digest import content_digest
from uptrain.data.readers import build_tokens
from uptrain.data.sources import Builtin, Dataset, Files, TextSource
from uptrain.data.text_encoder import TextEncoder
from uptrain.data.token_file import TokenFile
from uptrain.data.token_text import read_tokens
from uptrain.errors import UptrainError, UsageError


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UPTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/tokens"


def build(sources: Sequence[TextSource], words: Any, run: Path) -> Path:
    (folder,) = build_tokens(sources, TextEncoder(words), run)
    assert folder is not None
    return folder


def tokens(folder: Path) -> list[int]:
    meta = json.loads((folder / "tokens.json").read_text())
    return np.fromfile(folder / "tokens.bin", dtype=meta["dtype"]).tolist()


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_the_same_text_elsewhere_and_later_is_tokenised_once(
    tmp_path: Path, words: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = corpus(tmp_path / "a.txt", 40)
    other = tmp_path / "elsewhere.md"
    shutil.copy(one, other)
    os.utime(other, (1, 1))
    folder = build([Files(files=str(one))], words, tmp_path / "run1")
    assert folder.parent == cache
    assert tokens(folder) == words.backend_tokenizer.encode(one.read_text()).ids
    monkeypatch.setattr(TokenFile, "build", None)
    assert build([Files(files=str(other))], words, tmp_path / "run2") == folder


def variants(tmp_path: Path) -> dict[str, list[TextSource]]:
    """Return sources that give different tokens, though most are of the same bytes."""
    row = json.dumps({"text": "one fox", "body": "two dogs"}) + "\n"
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text(row)
    (tmp_path / "b.txt").write_text(row.replace("fox", "dog"))
    parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    shutil.copy(tmp_path / "a.parquet", tmp_path / "parquet.txt")
    for name in ("d", "e"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / ("a.jsonl" if name == "d" else "b.txt"), tmp_path / name / "rows.jsonl")

    def files(*names: str, **fields: str) -> list[TextSource]:
        return [Files(files=[str(tmp_path / name) for name in names], **fields)]

    return {
        "jsonl": files("a.jsonl"), "field": files("a.jsonl", text_field="body"),
        "chat": files("a.jsonl", chat_field="body"), "plain": files("a.txt"), "text": files("b.txt"),
        "two": files("a.txt", "b.txt"), "order": files("b.txt", "a.txt"), "parquet": files("a.parquet"),
        "not parquet": files("parquet.txt"), "dataset": [Dataset(dataset=str(tmp_path / "d"))],
        "dataset field": [Dataset(dataset=str(tmp_path / "d"), text_field="body")],
        "dataset rows": [Dataset(dataset=str(tmp_path / "e"))],
        "python": [Builtin(builtin="python-stdlib", split="held-out")],
    }  # fmt: skip


def test_whatever_changes_the_tokens_changes_the_digest(tmp_path: Path) -> None:
    found = variants(tmp_path)
    plain, chatty, other, longer = tokenizer(), tokenizer(), tokenizer(290), tokenizer()
    plain.chat_template = "{{ messages[0].content }}"
    chatty.chat_template = "{{ messages }}"
    longer.add_tokens(["foxes"])
    endless = tokenizer()
    endless.eos_token = endless.bos_token = None
    digests = {content_digest(sources, TextEncoder(plain)) for sources in found.values()}
    assert len(digests) == len(found)
    digests |= {content_digest(found["jsonl"], TextEncoder(each)) for each in (other, longer, endless)}
    digests.add(content_digest(found["chat"], TextEncoder(chatty)))
    assert len(digests) == len(found) + 4


def test_what_does_not_change_the_tokens_does_not_change_the_digest(tmp_path: Path, words: Any) -> None:
    found = variants(tmp_path)
    digest = content_digest(found["plain"], TextEncoder(words))
    same = Files(files=str(tmp_path / "a.txt"), text_field="body", weight=3)
    assert content_digest([same], TextEncoder(words)) == digest
    called = tokenizer()
    called.chat_template = "{{ messages }}"
    called(["one", "two foxes"], truncation=True, max_length=7, padding="max_length")
    assert content_digest(found["plain"], TextEncoder(called)) == digest
    words.save_pretrained(tmp_path / "tokenizer")
    assert content_digest(found["plain"], TextEncoder(type(words).from_pretrained(tmp_path / "tokenizer"))) == digest


class Slow:
    """A tokenizer without a backend of its own, as SentencePiece models without a conversion have."""

    eos_token_id, bos_token_id = 2, 1

    def __init__(self, model: bytes) -> None:
        self.model = model

    def __len__(self) -> int:
        return 10

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "spiece.model").write_bytes(self.model)


def test_a_tokenizer_without_a_backend_counts_by_its_files(tmp_path: Path) -> None:
    sources = [Files(files=str(corpus(tmp_path / "a.txt", 4)))]
    first, same, other = (content_digest(sources, TextEncoder(Slow(model))) for model in (b"a", b"a", b"b"))
    assert first == same
    assert first != other


def test_several_at_once_make_one_entry(tmp_path: Path, words: Any, cache: Path) -> None:
    source = Files(files=str(corpus(tmp_path / "a.txt", 3000)))
    together = threading.Barrier(4)
    found: list[Path] = []
    made: list[int] = []
    build_one = TokenFile.build

    def counting(*arguments: Any) -> None:
        made.append(1)
        build_one(*arguments)

    def work(run: Path) -> None:
        together.wait()
        found.append(build([source], words, run))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenFile, "build", counting)
        threads = [threading.Thread(target=work, args=(tmp_path / f"run{index}",)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(found)) == 1
    assert entries(cache) == [found[0].name]
    assert tokens(found[0]) == words.backend_tokenizer.encode((tmp_path / "a.txt").read_text()).ids
    assert made == [1]


@pytest.mark.parametrize("damage", ["killed", "cut", "no count"])
def test_what_a_dead_process_or_disk_left_is_made_again(tmp_path: Path, words: Any, cache: Path, damage: str) -> None:
    source = Files(files=str(corpus(tmp_path / "a.txt", 40)))
    folder = build([source], words, tmp_path / "run")
    whole = tokens(folder)
    if damage == "killed":
        folder.rename(folder.with_name(folder.name + ".partial"))
        (cache / f"{folder.name}.partial/tokens.json").unlink()
    elif damage == "cut":
        os.truncate(folder / "tokens.bin", 100)
    else:
        (folder / "tokens.json").write_text("")
    assert tokens(build([source], words, tmp_path / "run")) == whole
    assert entries(cache) == [folder.name]


def test_without_a_place_for_the_cache_the_run_keeps_its_tokens(
    tmp_path: Path, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("UPTRAIN_CACHE", str(tmp_path / "file/cache"))
    source = Files(files=str(corpus(tmp_path / "a.txt", 40)))
    folder = build([source], words, tmp_path / "run")
    assert folder.parent == tmp_path / "run"
    assert tokens(folder) == read_tokens([source], words, 10**6).ids.tolist()
    with pytest.raises(UptrainError, match="file/run"):
        token_cache.tokens_folder("0" * 64, [source], TextEncoder(words), tmp_path / "file/run")


def test_a_full_cache_leaves_nothing_and_the_run_keeps_its_tokens(
    tmp_path: Path, words: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_one = TokenFile.build

    def full(folder: Path, *arguments: Any) -> None:
        build_one(folder, *arguments)
        if folder.is_relative_to(cache):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TokenFile, "build", full)
    source = Files(files=str(corpus(tmp_path / "a.txt", 40)))
    assert build([source], words, tmp_path / "run").parent == tmp_path / "run"
    assert entries(cache) == []


def test_text_that_cannot_be_read_leaves_nothing(tmp_path: Path, words: Any, cache: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fox \xff")
    with pytest.raises(UsageError, match="UTF-8"):
        build([Files(files=str(tmp_path / "a.txt"))], words, tmp_path / "run")
    assert entries(cache) == []


def test_other_processes_of_a_run_do_not_read_the_text_again(
    tmp_path: Path, words: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = corpus(tmp_path / "a.txt", 40)
    folder = build([Files(files=str(path))], words, tmp_path / "run")
    path.unlink()
    assert build_tokens([Files(files=str(path))], TextEncoder(words), tmp_path / "run", first=False) == [folder]


@pytest.mark.parametrize(
    ("variables", "root"),
    [
        ({"UPTRAIN_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"UPTRAIN_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/uptrain"),
        ({"UPTRAIN_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/uptrain"),
        ({"UPTRAIN_CACHE": "", "XDG_CACHE_HOME": "not/absolute", "HOME": "/home/me"}, "/home/me/.cache/uptrain"),
        ({"UPTRAIN_CACHE": "~nobody-of-this-name/own"}, None),
    ],
)
def test_the_cache_is_where_the_environment_says(
    variables: dict[str, str], root: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert token_cache.cache_root() == (Path(root) if root else None)
