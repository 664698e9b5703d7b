"""The `uptrain` command: `python -m uptrain` does the same."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def main() -> None:
    """Run the command line, turning errors into one sentence and an exit code."""
    from uptrain.cli.app import run

    _end(run(sys.argv[1:]))


def _end(code: int) -> NoReturn:
    """End the process with an exit code; one of several that a launcher started, without finalizing the interpreter.

    A thread of their connection may still have to release Python objects of the last exchange. Where it comes too late
    for the interpreter, it aborts the process, and the launcher reports a finished run as failed.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized() or distributed.get_world_size() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
