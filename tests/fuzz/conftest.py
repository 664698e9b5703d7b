"""How many inputs a run of the fuzz tests tries, and a tally of them.

UPTRAIN_FUZZ_INPUTS is about how many a run tries in all; benchmarks/fuzz.py sets it, and reads the tally.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.attempt import TALLY


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory() -> Iterator[None]:
    """Nothing in these inputs of a few kB is worth 300 MB, those that declare petabytes included."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10


@pytest.fixture(autouse=True, scope="session")
def _tally() -> Iterator[None]:
    yield
    path = os.environ.get("UPTRAIN_FUZZ_TALLY")
    if path:
        Path(path).write_text(json.dumps(TALLY))
