"""Inject every fault of tests/faults and print the table: what was injected, survived, and lost.

    python -m benchmarks faults

A fault counts as survived when its test found OUT whole after it (the old one, the new one, or none), and the bytes of
an undisturbed run after the same command was repeated; so what survived lost no byte.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import ROOT, options, table


def main() -> int:
    options().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = Path(folder) / "tally.json"
        environment = {**os.environ, "UPTRAIN_FAULTS_TALLY": str(tally), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "pytest", "-m", "", "-n", "0", "-q", "tests/faults"]
        code = subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
        found: dict[str, list[int]] = json.loads(tally.read_text()) if tally.exists() else {}
    counts = {**found, "together": [sum(column) for column in zip(*found.values(), strict=True)] or [0, 0]}
    rows = (
        (kind, f"{injected:,}", f"{survived:,}", "0" if survived == injected else "see above")
        for kind, (injected, survived) in counts.items()
    )
    print("\n" + table({"fault": "left", "injected": "right", "survived": "right", "bytes lost": "right"}, rows))
    return code
