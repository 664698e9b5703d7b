"""Blocks hold exactly the text's tokens, in an order that a seed fixes and a saved position continues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.corpus import corpus, sentences, tokenizer
from uptrain.data import documents, text_files
from uptrain.data.block_reader import BlockReader
from uptrain.data.dataset_rows import open_dataset
from uptrain.data.sources import Builtin, Dataset, Files, TextSource, parse_source, text_of_option
from uptrain.data.text_encoder import TextEncoder
from uptrain.data.token_file import TokenFile
from uptrain.data.token_stream import TokenStream
from uptrain.data.token_text import read_tokens
from uptrain.errors import UptrainError, UsageError


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer()


def numbered(folder: Path, count: int) -> Path:
    """Write a token file whose tokens are their own positions, so that a block says where it was cut."""
    folder.mkdir(exist_ok=True)
    np.arange(count, dtype=np.uint32).tofile(folder / "tokens.bin")
    counts = {"tokens": count, "documents": 1, "bytes": count, "digest": "sha256:numbered"}
    (folder / "tokens.json").write_text(json.dumps({"dtype": "uint32", "count": counts}))
    return folder


def build(folder: Path, sources: Sequence[TextSource], words: Any) -> np.ndarray[Any, Any]:
    TokenFile.build(folder, sources, TextEncoder(words))
    meta = json.loads((folder / "tokens.json").read_text())
    return np.fromfile(folder / "tokens.bin", dtype=meta["dtype"])


def test_the_token_file_is_every_document_with_end_of_text_between(tmp_path: Path, words: Any) -> None:
    texts = ["one fox", "two dogs\nand tea", "naïve 🦊"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts), encoding="utf-8")
    (tmp_path / "b.txt").write_text("the end", encoding="utf-8")
    sources = [Files(files=str(tmp_path / "a.jsonl"), text_field="body"), Files(files=str(tmp_path / "b.txt"))]
    ids = build(tmp_path / "tokens", sources, words)
    oracle: list[int] = []
    for text in [*texts, "the end"]:
        oracle += [words.eos_token_id] * bool(oracle) + words.backend_tokenizer.encode(text).ids
    assert ids.tolist() == oracle
    count = TokenFile(tmp_path / "tokens", 4, 0).count
    assert count.documents == 4
    assert count.bytes == sum(len(text.encode()) for text in [*texts, "the end"])


def test_a_long_document_is_read_in_pieces_and_stays_one_document(
    tmp_path: Path, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = corpus(tmp_path / "long.txt", lines=300)
    monkeypatch.setattr(text_files, "PIECE", 500)
    source = Files(files=str(path))
    assert len(list(documents.pieces([source]))) > 10
    ids = build(tmp_path / "tokens", [source], words)
    assert words.eos_token_id not in ids
    assert words.decode(ids) == path.read_text()


@given(tokens=st.integers(8, 400), block=st.integers(2, 40), seed=st.integers(0, 5))
def test_an_epoch_visits_disjoint_blocks_once_and_leaves_less_than_two_out(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, block: int, seed: int
) -> None:
    if tokens < block:
        return
    folder = numbered(tmp_path_factory.mktemp("numbered"), tokens)
    reader = TokenFile(folder, block, seed)
    per_epoch = max(1, (tokens - block + 1) // block)
    for _ in range(2):
        epoch = reader.take(per_epoch)
        assert (np.diff(epoch, axis=1) == 1).all()
        starts = sorted(epoch[:, 0].tolist())
        assert all(later - earlier == block for earlier, later in pairwise(starts))
        assert tokens - epoch.size < 2 * block
        assert starts[0] >= 0
        assert starts[-1] + block <= tokens


def test_epochs_differ_in_order_and_cut_and_seeds_differ(tmp_path: Path) -> None:
    folder = numbered(tmp_path, 1000)
    reader, same, other = (TokenFile(folder, 16, seed) for seed in (1, 1, 2))
    first, second = reader.take(61), reader.take(61)
    assert (same.take(61) == first).all()
    assert {*first[:, 0] % 16} != {*second[:, 0] % 16} or (first != second).any()
    assert (other.take(61) != first).any()


def jsonl_folder(path: Path, rows: int = 40) -> Path:
    path.mkdir()
    lines = [json.dumps({"text": sentences(5, seed)}) + "\n" for seed in range(rows)]
    (path / "a.jsonl").write_text("".join(lines[: rows // 2]))
    (path / "b.jsonl").write_text("".join(lines[rows // 2 :]))
    return path


def readers(tmp_path: Path, words: Any) -> dict[str, tuple[BlockReader, BlockReader]]:
    """Return two equal readers of each kind."""
    source = Dataset(dataset=str(tmp_path / "rows"), stream=True)
    return {
        "file": (TokenFile(tmp_path / "tokens", 16, 3), TokenFile(tmp_path / "tokens", 16, 3)),
        "stream": (TokenStream(source, TextEncoder(words), 16), TokenStream(source, TextEncoder(words), 16)),
    }


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("taken", [0, 1, 7, 300])
def test_a_saved_position_goes_on_with_the_very_next_block(tmp_path: Path, words: Any, kind: str, taken: int) -> None:
    rows = jsonl_folder(tmp_path / "rows")
    build(tmp_path / "tokens", [Files(files=str(rows / "*.jsonl"))], words)
    undisturbed, resumed = readers(tmp_path, words)[kind]
    if taken:
        undisturbed.take(taken)
    state = json.loads(json.dumps(undisturbed.state_dict()))
    resumed.load_state_dict(state)
    assert (resumed.take(50) == undisturbed.take(50)).all()


def test_a_streamed_dataset_gives_the_same_tokens_as_its_files(tmp_path: Path, words: Any) -> None:
    rows = jsonl_folder(tmp_path / "rows")
    ids = build(tmp_path / "tokens", [Files(files=str(rows / "*.jsonl"))], words)
    stream = TokenStream(Dataset(dataset=str(rows), stream=True), TextEncoder(words), 16)
    count = len(ids) // 16
    assert stream.take(count).ravel().tolist() == ids[: count * 16].tolist()
    loaded = build(tmp_path / "loaded", [Dataset(dataset=str(rows))], words)
    assert loaded.tolist() == ids.tolist()


def test_a_position_in_other_data_is_refused(tmp_path: Path) -> None:
    reader = TokenFile(numbered(tmp_path, 100), 8, 0)
    with pytest.raises(UsageError, match="data changed"):
        reader.load_state_dict({"blocks": 3, "digest": "sha256:other"})


@pytest.mark.parametrize("limit", [10, 137, 10**6])
def test_evaluation_text_counts_the_bytes_its_tokens_spell(tmp_path: Path, words: Any, limit: int) -> None:
    path = corpus(tmp_path / "a.txt", 60)
    text = read_tokens([Files(files=str(path))], words, limit)
    assert len(text.ids) <= limit
    spelt = words.decode(text.ids)
    assert path.read_text().startswith(spelt)
    assert text.bytes == len(spelt.encode())


def test_every_machine_has_text() -> None:
    piece = next(documents.pieces([Builtin(builtin="python-stdlib")]))
    assert len(piece.text) > 100


@pytest.mark.parametrize(
    ("name", "content", "words_said"),
    [
        ("a.jsonl", b'{"text": "x"}\nnot json\n', "line 2.*JSON"),
        ("a.jsonl", b'{"txt": "x"}\n', "'txt'"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.txt", b"", "text"),
        ("b.txt", b"x", "file"),
    ],
)
def test_unusable_text_is_one_sentence(tmp_path: Path, words: Any, name: str, content: bytes, words_said: str) -> None:
    (tmp_path / name).write_bytes(content)
    named = "a.txt" if name == "b.txt" else name
    with pytest.raises(UsageError, match=words_said):
        read_tokens([Files(files=str(tmp_path / named))], words, 100)


def test_too_little_text_for_a_block_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="64"):
        TokenFile(numbered(tmp_path, 63), 64, 0)


def test_a_dataset_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UptrainError, match="can't be loaded"):
        open_dataset(Dataset(dataset=str(tmp_path / "nowhere")))
    with pytest.raises(UptrainError, match="can't be loaded"):
        open_dataset(Dataset(dataset="/"))


def test_every_file_format_of_the_installed_datasets_is_known() -> None:
    """What `load_dataset` takes for a format reads the files of the current folder instead of a dataset."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    for name in _PACKAGED_DATASETS_MODULES:
        with pytest.raises(ValueError, match="name of a file format"):
            parse_source(name)
        with pytest.raises(UsageError, match=f"--text {name}"):
            text_of_option("--text", name)
    assert parse_source("text.txt") == Files(files="text.txt")
    assert parse_source("./text") == Dataset(dataset="./text")
