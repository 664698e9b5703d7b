"""What a training loop stands on: the accelerator, the optimizer, and a stop that waits for a step's end."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from uptrain.errors import UsageError
from uptrain.models import devices
from uptrain.training.launch import join
from uptrain.training.recipe import Recipe

_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
_LAUNCHED_FSDP = "UPTRAIN_LAUNCHED_FSDP"
LOWER = (
    "Raise gradient_accumulation, set gradient_checkpointing: true, or fsdp: true on several devices; else lower "
    "block_size or batch_size. What was written stays."
)
"""What a recipe can do where memory is full."""


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Join the processes that were launched, on whatever devices there are, and set precision and threads.

    Raises:
        UsageError: launched under DeepSpeed, a tracker is not installed, or as `join`.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "") == "true":
        raise UsageError(
            "DeepSpeed is not supported.",
            "FSDP2 shares out the same things as ZeRO-3: accelerate launch --config_file recipes/accelerate/fsdp2.yaml",
        )
    for tracker in recipe.trackers:
        if not any(importlib.util.find_spec(name) for name in _TRACKERS[tracker]):
            raise UsageError(f"The tracker {tracker} is not installed.", f"pip install {_TRACKERS[tracker][0]}")
    if os.environ.pop("ACCELERATE_USE_FSDP", "") == "true":
        # Weights are shared out by uptrain.training.parallel, the same on every device; accelerate only launches.
        os.environ[_LAUNCHED_FSDP] = "true"
    place = join().device
    accelerator = Accelerator(
        mixed_precision="bf16" if devices.precision(recipe.precision, place) == "bf16" else "no",
        log_with=list(recipe.trackers) or None,
        project_dir=f"{recipe.output}.logs" if recipe.trackers else None,
    )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if accelerator.device.type == "cpu" and local > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # torchrun sets one thread a process, whatever the machine has.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    return accelerator


def precision_of(accelerator: Accelerator) -> str:
    """Return the precision that products are computed in: bf16 or fp32."""
    return "bf16" if accelerator.mixed_precision == "bf16" else "fp32"


def shards(recipe: Recipe) -> bool:
    """Tell whether weights are to be shared out (FSDP), by the recipe or by `accelerate launch --use_fsdp`."""
    return recipe.fsdp or os.environ.get(_LAUNCHED_FSDP, "") == "true"


def seed_own(seed: int, accelerator: Accelerator) -> None:
    """Let each process but the first draw numbers of its own, so that no two drop out the same of different text."""
    if accelerator.process_index:
        own = np.random.SeedSequence([seed, accelerator.process_index]).generate_state(1, np.uint64)
        torch.manual_seed(int(own[0]))


@contextmanager
def on_stop_signal(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at Ctrl-C or SIGTERM, for a stop after the running step; a second Ctrl-C stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = False

    def handle(number: int, _frame: Any) -> None:
        nonlocal told
        if number == signal.SIGINT and told:
            raise KeyboardInterrupt
        told = True
        stop()

    earlier = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
