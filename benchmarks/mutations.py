"""Take each guard out of the code, one at a time, and say which of them no test misses.

    python -m benchmarks mutations                      # all modules below, each with the tests that should notice
    python -m benchmarks mutations uptrain/conversion/plan/mla.py
    python -m benchmarks mutations uptrain/architectures/projections.py --tests tests/architectures/test_projections.py

A guard is a `raise`, which is replaced by `pass`. It survives when the tests pass without it: then either a test is
missing, or nothing can reach it and it should go. Tests run in a copy of the repository, so the working tree is left
alone. The exit code is 1 where a guard survives.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import ROOT, options

COPIED = ("uptrain", "tests", "recipes", "docs", "pyproject.toml", "README.md")
SECONDS = 900
"""After which a run of the tests counts as one that noticed: a missing guard can make a loop endless."""

PLANS = ("--noconftest", "tests/conversion/test_refusals.py")
"""These need neither torch nor the fixtures, and take two seconds."""
ORDER = ("tests/architectures/test_head_order.py",)
QUANTIZED = ("tests/architectures/test_quantization.py",)
READING = (
    "tests/checkpoint",
    "tests/checkpoint/test_hub.py",
    "tests/publishing/test_hub_checks.py",
    "tests/checkpoint/test_signature.py",
)
NOTICED_BY: dict[str, tuple[str, ...]] = {
    "uptrain/conversion/plan/planner.py": PLANS,
    "uptrain/conversion/plan/checks.py": PLANS,
    "uptrain/conversion/plan/mla.py": PLANS,
    "uptrain/conversion/plan/norms.py": PLANS,
    "uptrain/conversion/plan/target_tensors.py": PLANS,
    "uptrain/conversion/request.py": PLANS,
    "uptrain/architectures/description.py": PLANS,
    "uptrain/architectures/layer_attention.py": PLANS,
    "uptrain/architectures/validation.py": PLANS,
    "uptrain/architectures/rope.py": PLANS,
    "uptrain/architectures/head_order.py": ORDER,
    "uptrain/conversion/plan/quantized.py": QUANTIZED,
    "uptrain/architectures/quantization.py": QUANTIZED,
    "uptrain/checkpoint/gguf.py": QUANTIZED,
    "uptrain/checkpoint/header.py": READING,
    "uptrain/checkpoint/jsonfile.py": READING,
    "uptrain/checkpoint/reader.py": READING,
    "uptrain/checkpoint/source.py": READING,
}


@dataclass(frozen=True)
class Guard:
    """A `raise` in `file`: its first line, what it says, and the file's text without it."""

    file: str
    line: int
    says: str
    without: str


def guards_of(file: str) -> Iterator[Guard]:
    """Yield the guards of a file; one inside an `except` passes on what was raised before, and is none."""
    text = (ROOT / file).read_text()
    lines, tree = text.splitlines(keepends=True), ast.parse(text)
    caught = {
        node for handler in ast.walk(tree) if isinstance(handler, ast.ExceptHandler) for node in ast.walk(handler)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node not in caught and node.end_lineno is not None:
            before, after = lines[: node.lineno - 1], lines[node.end_lineno :]
            without = "".join([*before, " " * node.col_offset + "pass\n", *after])
            yield Guard(file, node.lineno, " ".join(ast.unparse(node).split())[:90], without)


def survives(guard: Guard, folder: Path, tests: tuple[str, ...]) -> bool:
    """Tell whether the tests pass in `folder`, a copy of the repository, without the guard."""
    path = folder / guard.file
    whole = path.read_text()
    path.write_text(guard.without)
    try:
        return passes(folder, tests)
    finally:
        path.write_text(whole)


def passes(folder: Path, tests: tuple[str, ...]) -> bool:
    """Tell whether tests pass in a copy of the repository."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "", "-n", "0", "-q", "-x", *tests]
    try:
        done = subprocess.run(command, env=environment, cwd=folder, timeout=SECONDS, capture_output=True, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main() -> int:
    parser = options()
    parser.add_argument("files", nargs="*", default=list(NOTICED_BY), help="modules, as seen from the repository")
    parser.add_argument("--tests", nargs="+", help="what to run in place of the tests that are known for them")
    arguments = parser.parse_args()
    survived: list[Guard] = []
    count = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for each in COPIED:
            source = ROOT / each
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / each)
        for file in arguments.files:
            tests = tuple(arguments.tests or NOTICED_BY[file])
            if not passes(folder, tests):
                sys.exit(f"{' '.join(tests)} fails with every guard in its place.")
            for guard in guards_of(file):
                count += 1
                alive = survives(guard, folder, tests)
                survived += [guard] if alive else []
                print(f"{'SURVIVES' if alive else 'noticed '} {guard.file}:{guard.line} {guard.says}", flush=True)
    print(f"{count} guards, {len(survived)} of which no test misses.")
    return 1 if survived else 0
