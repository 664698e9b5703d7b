"""Inject every fault of tests/faults and print the table: what was injected, survived, and lost.

    python benchmarks/faults.py

A fault counts as survived when its test found OUT whole after it (the old one, the new one, or none), and the bytes of
an undisturbed run after the same command was repeated; so what survived lost no byte.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = Path(folder) / "tally.json"
        environment = {**os.environ, "UPTRAIN_FAULTS_TALLY": str(tally), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "pytest", "-m", "", "-n", "0", "-q", "tests/faults"]
        code = subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
        found: dict[str, list[int]] = json.loads(tally.read_text()) if tally.exists() else {}
    print("\n| fault | injected | survived | bytes lost |\n|---|---:|---:|---:|")
    rows = {**found, "together": [sum(column) for column in zip(*found.values(), strict=True)] or [0, 0]}
    for kind, (injected, survived) in rows.items():
        print(f"| {kind} | {injected:,} | {survived:,} | {'0' if survived == injected else 'see above'} |")
    return code


if __name__ == "__main__":
    sys.exit(main())
