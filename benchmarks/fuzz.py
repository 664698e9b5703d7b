"""Try many hostile inputs: the fuzz tests of tests/fuzz with more of them, and what became of each.

    python benchmarks/fuzz.py --inputs 100000

Inputs that fail are kept in .hypothesis/ and tried first the next time; put them into the tests as examples.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="about how many inputs to try")
    parser.add_argument("tests", nargs="*", default=["tests/fuzz"], help="of which tests (default: all of tests/fuzz)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = Path(folder) / "tally.json"
        environment = {
            **os.environ,
            "UPTRAIN_FUZZ_INPUTS": str(arguments.inputs),
            "UPTRAIN_FUZZ_TALLY": str(tally),
            "PYTHONPATH": str(ROOT),
        }
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "--timeout", "0", *arguments.tests]
        code = subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
        found = json.loads(tally.read_text()) if tally.exists() else {}
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, processor = time.monotonic() - began, usage.ru_utime + usage.ru_stime
    accepted, refused = found.get("accepted", 0), found.get("refused", 0)
    print(f"{accepted + refused:,} calls: {accepted:,} accepted, {refused:,} refused in a sentence.")
    print(f"{seconds:,.0f} s, {processor:,.0f} s of processor time, peak memory {usage.ru_maxrss / 2**10:,.0f} MiB.")
    print("No failure." if code == 0 else "FAILED: see above.")
    return code


if __name__ == "__main__":
    sys.exit(main())
