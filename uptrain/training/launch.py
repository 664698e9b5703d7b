"""Join the processes that a launcher started, in one place, and say what fails in any of them once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import InitProcessGroupKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from torch import distributed

from uptrain.errors import UptrainError, UsageError
from uptrain.models import devices

_SAID = "uptrain/said"
# In what a collective raises when a process that takes part in it is gone.
_LOST = ("closed by peer", "connection reset", "broken pipe", "gloo")
_PATIENCE = 3.0
"""Seconds that a process waits for the first one to say what fails in both."""


class PeerLost(UptrainError):
    """Another process of the run ended, so this one can't go on."""


def join_processes() -> PartialState:
    """Make this process's state: its device, its number and its way to the others, and return it.

    Whoever makes it first decides for all of accelerate, so it is made here and nowhere else.

    Raises:
        UsageError: torch has no device of the name asked for, or the launcher's processes don't find each other.
    """
    place, (processes, variable) = devices.device(), devices.launched()
    if processes > 1 and devices.rank() is None:
        raise UsageError(
            f"{variable} says that {processes} processes were launched, but not which of them this is.",
            f"Start them with torchrun or accelerate launch; for one process, unset {variable}.",
        )
    if PartialState._shared_state and not distributed.is_initialized():
        # Another device, or a state that something else has made as for one process.
        PartialState._reset_state()
    AcceleratorState._reset_state()
    # The first process tokenises while the others wait, which may take hours.
    timeout = InitProcessGroupKwargs(timeout=timedelta(hours=12)).to_kwargs()
    try:
        with patch_environment(accelerate_torch_device=str(place)):
            state = PartialState(cpu=place.type == "cpu", **timeout)
    except (ValueError, distributed.DistError) as error:
        raise UsageError(
            f"The {processes} processes that were launched can't be joined: {' '.join(str(error).split())[:300]}",
            "Start them with torchrun or accelerate launch.",
        ) from None
    if state.num_processes < processes:
        raise UsageError(
            f"{processes} processes were launched ({variable}), but this one sees only {state.num_processes} on "
            f"{place}, so each would train alone.",
            "Start them with torchrun or accelerate launch, on devices that torch.distributed can connect; for one "
            f"process, unset {variable}.",
        )
    state.device = place
    if place.index is not None:
        torch.accelerator.set_device_index(place.index)
    return state


@contextmanager
def accelerate_device() -> Iterator[None]:
    """Tell accelerate, which reads ACCELERATE_USE_CPU again and again, what `devices.device` makes of it.

    An empty one would stop it, and so would a true one beside another device that a command names.
    """
    with patch_environment(accelerate_use_cpu=str(devices.device().type == "cpu").lower()):
        yield


@contextmanager
def report_lost_process() -> Iterator[None]:
    """Say in one sentence that another process is gone, where a collective of the block fails of that.

    Raises:
        PeerLost: it does.
    """
    try:
        yield
    except RuntimeError as error:
        alone = not distributed.is_initialized() or distributed.get_world_size() == 1
        if alone or not (isinstance(error, distributed.DistError) or _speaks_of_loss(error)):
            raise
        raise PeerLost(
            f"Another process of this run ended, so this one can't go on: {' '.join(str(error).split())[:200]}",
            "Its own message says why; the same command goes on from the last checkpoint.",
        ) from None


def _speaks_of_loss(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(word in text for word in _LOST)


def announce(error: UptrainError) -> bool:
    """Tell whether this process is to say its error: the first always, another only what the first doesn't say."""
    store = _store()
    if not devices.rank():
        if store is not None:
            with contextlib.suppress(RuntimeError):
                store.set(_SAID, error.message)
        return True
    # Where no store connects them, a launcher ends this process as soon as the first has failed.
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(RuntimeError):
            if store is not None and store.check([_SAID]):
                return not isinstance(error, PeerLost) and store.get(_SAID).decode() != error.message
        time.sleep(0.05)
    return True


def _store() -> Any:
    if not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()
