"""The tensors of a checkpoint, with torch.distributed.checkpoint: any number of processes can resume from them."""

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

# Frozen weights are those of the source checkpoint, so they are not saved again.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def save(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """Write trained weights, the optimizer's state and this process's random state; all processes call this.

    - `folder`: an empty folder.
    - `module`: the objective, as DDP or FSDP wrapped it.
    - `optimizer`: its state is written.
    - `accelerator`: this process's device and rank.
    """
    model_state, optimizer_state = get_state_dict(module, optimizer, options=_OPTIONS)
    with warnings.catch_warnings():
        # torch warns that one process needs no coordination.
        warnings.simplefilter("ignore")
        dcp.state_dict_saver.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    torch.save(devices.random_state(accelerator.device), folder / f"random-{accelerator.process_index}.pt")


def load(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """Restore what `save` wrote, with any number of processes; all processes call this.

    - `folder`: the folder of the checkpoint.
    - `module`: the objective, whose weights are replaced.
    - `optimizer`: its state is replaced.
    - `accelerator`: this process's device and rank.

    Raises:
        CheckpointError: a file is missing or incomplete.
    """
    model_state, optimizer_state = get_state_dict(module, optimizer, options=_OPTIONS)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.state_dict_loader.load(state, checkpoint_id=folder)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, dcp.api.CheckpointException) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder} can't be read: {reason}", "Start again with --restart.") from None
    set_state_dict(
        module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_OPTIONS
    )
    random = folder / f"random-{accelerator.process_index}.pt"
    # A process of a higher rank than the saved run had starts with the random state of its seed.
    if random.is_file():
        devices.set_random_state(torch.load(random, weights_only=True), accelerator.device)
