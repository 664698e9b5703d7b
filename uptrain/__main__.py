"""The `uptrain` command: `python -m uptrain` does the same."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, turning errors into one sentence and an exit code."""
    from uptrain.cli.app import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
