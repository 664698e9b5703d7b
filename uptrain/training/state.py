"""A run's state on disk, through torch.distributed.checkpoint: any number of processes can take it up."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from uptrain.errors import CheckpointError
from uptrain.models import devices

# What doesn't train is the source's, and is there already.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def save(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """Write weights that train, optimizer and this process's random state into `folder`; all processes call this."""
    model_state, optimizer_state = get_state_dict(module, optimizer, options=_OPTIONS)
    with warnings.catch_warnings():
        # It remarks that one process needs no coordination.
        warnings.simplefilter("ignore")
        dcp.state_dict_saver.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    torch.save(devices.random_state(accelerator.device), folder / f"random-{accelerator.process_index}.pt")


def load(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """Take up what `save` wrote, with as many processes as there are now; all processes call this.

    Raises:
        CheckpointError: a file is missing or cut short.
    """
    model_state, optimizer_state = get_state_dict(module, optimizer, options=_OPTIONS)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.state_dict_loader.load(state, checkpoint_id=folder)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, dcp.api.CheckpointException) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder} can't be read: {reason}", "Start anew with --restart.") from None
    set_state_dict(
        module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_OPTIONS
    )
    random = folder / f"random-{accelerator.process_index}.pt"
    # A process that the saved run didn't have starts with the state that its seed gave it.
    if random.is_file():
        devices.set_random_state(torch.load(random, weights_only=True), accelerator.device)
