"""Count what is injected; UPTRAIN_FAULTS_TALLY names a file for the counts, which benchmarks/faults.py reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.tally import CALIBRATING, INJECTED, SURVIVED, settle


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    report = yield
    if report.when == "call":
        settle(report.passed, CALIBRATING if item.path.name == "test_calibrating.py" else None)
    return report


@pytest.fixture(autouse=True, scope="session")
def _tally() -> Iterator[None]:
    yield
    path = os.environ.get("UPTRAIN_FAULTS_TALLY")
    if path:
        Path(path).write_text(json.dumps({kind: [INJECTED[kind], SURVIVED[kind]] for kind in INJECTED}))
