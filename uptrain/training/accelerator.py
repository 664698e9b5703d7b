"""The accelerator of a run: this process's device and precision, its threads, and its random numbers."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import torch
from accelerate import Accelerator

from uptrain.errors import UsageError
from uptrain.models import devices
from uptrain.training.launch import join_processes
from uptrain.training.recipe import Recipe

_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
_LAUNCHED_FSDP = "UPTRAIN_LAUNCHED_FSDP"
LESS_MEMORY = (
    "Raise gradient_accumulation, set gradient_checkpointing: true, or fsdp: true on several devices; else lower "
    "block_size or batch_size. What was written stays."
)
"""What a user can change in a recipe where memory is full."""


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Join the processes that were launched, on whatever devices there are, and set precision and threads.

    Raises:
        UsageError: launched under DeepSpeed, a tracker is not installed, the batch can't be divided between the
            processes, or as `join_processes`.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "") == "true":
        raise UsageError(
            "DeepSpeed is not supported.",
            "FSDP2 divides the same tensors as ZeRO-3: accelerate launch --config_file recipes/accelerate/fsdp2.yaml",
        )
    for tracker in recipe.trackers:
        if not any(importlib.util.find_spec(name) for name in _TRACKERS[tracker]):
            raise UsageError(f"The tracker {tracker} is not installed.", f"pip install {_TRACKERS[tracker][0]}")
    if os.environ.pop("ACCELERATE_USE_FSDP", "") == "true":
        # uptrain.training.parallel divides the weights, in the same way on every device; accelerate only launches.
        os.environ[_LAUNCHED_FSDP] = "true"
    place = join_processes().device
    accelerator = Accelerator(
        mixed_precision="bf16" if devices.precision(recipe.precision, place) == "bf16" else "no",
        log_with=list(recipe.trackers) or None,
        project_dir=f"{recipe.output}.logs" if recipe.trackers else None,
    )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if accelerator.device.type == "cpu" and local > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # torchrun sets one thread per process on any machine.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    if recipe.batch_size % (accelerator.num_processes * recipe.gradient_accumulation):
        raise UsageError(
            f"batch_size {recipe.batch_size} counts a whole step's sequences, so it must be a multiple of "
            f"{accelerator.num_processes} process(es) × gradient_accumulation {recipe.gradient_accumulation}."
        )
    return accelerator


def shards(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Tell whether to divide weights between processes (FSDP), by the recipe or by `accelerate launch --use_fsdp`."""
    wanted = recipe.fsdp or os.environ.get(_LAUNCHED_FSDP, "") == "true"
    return wanted and accelerator.num_processes > 1


def seed_process(seed: int, accelerator: Accelerator) -> None:
    """Give each process but the first its own random numbers, so that dropout differs between processes."""
    if accelerator.process_index:
        own = np.random.SeedSequence([seed, accelerator.process_index]).generate_state(1, np.uint64)
        torch.manual_seed(int(own[0]))
