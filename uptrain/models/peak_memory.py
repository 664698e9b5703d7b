"""How much memory a process has taken."""

from __future__ import annotations

import resource
import sys

import torch


def memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has had so far: the accelerator's, or on a CPU its resident set."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
