"""Every source of text gives its documents whole and in order, whatever the file's own layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from uptrain.data import documents
from uptrain.data.sources import Files
from uptrain.errors import UsageError


def parquet_file(path: Path, texts: Sequence[str | None], **options: Any) -> Path:
    numbers = list(range(len(texts)))
    parquet.write_table(pa.table({"id": numbers, "text": pa.array(texts, pa.string())}), path, **options)
    return path


@settings(deadline=None)
@given(texts=st.lists(st.text(max_size=30), max_size=150), rows=st.integers(1, 70), big=st.booleans())
def test_a_parquet_file_is_its_column_whatever_its_row_groups(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], rows: int, big: bool
) -> None:
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    kind = pa.large_string() if big else pa.string()
    parquet.write_table(pa.table({"body": pa.array(texts, kind)}), path, row_group_size=rows)
    found = documents.pieces([Files(files=str(path), text_field="body")])
    assert [(piece.text, piece.first) for piece in found] == [(text, True) for text in texts]


def test_a_parquet_row_group_is_never_in_memory_whole(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    texts = [draw.bytes(8192).hex() for _ in range(1024)]
    path = parquet_file(tmp_path / "a.parquet", texts, use_dictionary=False, write_batch_size=16)
    assert parquet.ParquetFile(path).num_row_groups == 1
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in documents.pieces([Files(files=str(path))]))
    assert most < sum(map(len, texts)) / 4


def test_other_columns_of_a_parquet_file_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    images = [np.random.default_rng(row).bytes(100) for row in range(50)]
    parquet.write_table(pa.table({"image": images, "text": ["x"] * 50}), path, compression="zstd")
    chunk = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * chunk.total_compressed_size)
    assert [piece.text for piece in documents.pieces([Files(files=str(path))])] == ["x"] * 50


def test_unusable_parquet_is_one_sentence(tmp_path: Path) -> None:
    def read(path: Path, **options: Any) -> None:
        list(documents.pieces([Files(files=str(path), **options)]))

    with pytest.raises(UsageError, match=r"a\.parquet, row 2\b.*'text'.*null"):
        read(parquet_file(tmp_path / "a.parquet", ["x", None]))
    with pytest.raises(UsageError, match="'text'"):
        read(tmp_path / "a.parquet", text_field="txt")
    with pytest.raises(UsageError, match=r"row 1\b.*'id'.* 0"):
        read(tmp_path / "a.parquet", text_field="id")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-5])
    with pytest.raises(UsageError, match="Parquet"):
        read(tmp_path / "a.parquet")
