"""A conversion needs no more memory for many layers than for few."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.common import Llama, child
from benchmarks.convert_scale import MODELS, make_sparse

LAYER = 2 * (4 * 256**2 + 3 * 256 * 4096)


def peak(folder: Path, layers: int) -> int:
    make_sparse(folder, Llama(layers, 256, 4096, 1000, 16), limit=6 * LAYER)
    found = child("convert_scale", "--source", folder)
    assert found["shards"] > layers // 6
    return int(found["peak_rss_bytes"])


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    few, many = peak(tmp_path / "few", 12), peak(tmp_path / "many", 72)
    assert many - few < 3 * LAYER


def test_the_sparse_source_is_a_checkpoint_that_takes_no_disk(tmp_path: Path) -> None:
    total = make_sparse(tmp_path / "source", MODELS["70B"])
    files = list((tmp_path / "source").iterdir())
    attention, mlp, norms = 4 * 8192**2, 3 * 8192 * 28672, 2 * 8192
    assert total == 2 * (80 * (attention + mlp + norms) + 2 * 32000 * 8192 + 8192)
    assert sum(file.stat().st_size for file in files) > total
    assert sum(file.stat().st_blocks * 512 for file in files) < 2**22
