"""Ask a child process of the same Python what needs torch, so that this process stays small."""

from __future__ import annotations

import os
import subprocess
import sys

_QUIET = {
    "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8",
}  # fmt: skip
"""Questions are about names, numbers and text: no device, no network, and one thread."""


def ask(module: str, *arguments: str, text: str | None = None, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` and return its output and exit code, which the caller checks.

    - `module`: the module to run.
    - `arguments`: of the command line.
    - `text`: its standard input, None for none.
    - `seconds`: how long it may take.

    The child imports from the same folders as this process, and not from the current one, which may be a checkpoint
    with a torch.py in it.

    Raises:
        OSError: it can't be started.
        subprocess.TimeoutExpired: it took longer than `seconds`.
    """
    paths = os.pathsep.join(filter(None, sys.path))
    given = {"stdin": subprocess.DEVNULL} if text is None else {"input": text}
    return subprocess.run(
        [sys.executable, "-P", "-m", module, *arguments], capture_output=True, encoding="utf-8", errors="replace",
        env={**os.environ, **_QUIET, "PYTHONPATH": paths}, timeout=seconds, check=False, **given,
    )  # fmt: skip
