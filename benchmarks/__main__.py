"""Run a benchmark: `python -m benchmarks NAME [options]`; without a name, list them."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path

NO_COMMANDS = ("__init__", "__main__", "baselines", "common", "peer_models")
"""Modules that other benchmarks use."""


def names() -> dict[str, str]:
    """Return each benchmark with the first sentence of its docstring; none of them is imported for that."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in NO_COMMANDS:
            about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = " ".join(about.split("\n\n")[0].split())
    return found


def main() -> object:
    """Run the benchmark that the command line names with the options after it."""
    known, given = names(), sys.argv[1:]
    if not given or given[0] in ("-h", "--help"):
        print("python -m benchmarks NAME [options]; NAME --help shows a benchmark's options.\n")
        for name, about in known.items():
            print(f"  {name:<16} {about}")
        return 0
    name = given[0].removesuffix(".py").replace("-", "_")
    if name not in known:
        return f"There is no benchmark {given[0]}. Known: {', '.join(known)}."
    sys.argv = [f"python -m benchmarks {name}", *given[1:]]
    return import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    sys.exit(main())
