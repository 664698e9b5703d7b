"""Try many hostile inputs: the fuzz tests of tests/fuzz with more of them, and what became of each.

    python -m benchmarks fuzz --inputs 100000

Inputs that fail are kept in .hypothesis/ and tried first the next time; put them into the tests as examples.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.common import ROOT, options, peak_memory, timed

ROUND = 20_000
"""Inputs of one process: hypothesis remembers all that it tried, and the tests hold their memory to a limit."""


def main() -> int:
    parser = options()
    parser.add_argument("--inputs", type=int, default=100_000, help="about how many inputs to try")
    parser.add_argument("tests", nargs="*", default=["tests/fuzz"], help="of which tests (default: all of tests/fuzz)")
    arguments = parser.parse_args()
    tally, code = Counter[str](), 0
    rounds = -(-arguments.inputs // ROUND)
    with timed() as timer:
        for number in range(rounds):
            found, failed = one_round(arguments.tests, -(-arguments.inputs // rounds), number)
            tally.update(found)
            code = code or failed
            print(f"round {number + 1} of {rounds}: {tally.total():,} calls, {timer.seconds:,.0f} s", flush=True)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor, peak = usage.ru_utime + usage.ru_stime, peak_memory(resource.RUSAGE_CHILDREN)
    print(f"{tally.total():,} calls: {tally['accepted']:,} accepted, {tally['refused']:,} refused in a sentence.")
    print(f"{timer.seconds:,.0f} s, {processor:,.0f} s of processor time, peak memory {peak / 2**20:,.0f} MiB.")
    print("No failure." if code == 0 else "FAILED: see above.")
    return code


def one_round(tests: list[str], inputs: int, seed: int) -> tuple[dict[str, int], int]:
    """Run the tests with as many inputs; return what became of the calls, and pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        tally = Path(folder) / "tally.json"
        environment = {
            **os.environ,
            "UPTRAIN_FUZZ_INPUTS": str(inputs),
            "UPTRAIN_FUZZ_TALLY": str(tally),
            "PYTHONPATH": str(ROOT),
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "",
            "-n",
            "0",
            "-q",
            "--timeout",
            "0",
            f"--hypothesis-seed={seed}",
            *tests,
        ]
        code = subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
        return json.loads(tally.read_text()) if tally.exists() else {}, code
