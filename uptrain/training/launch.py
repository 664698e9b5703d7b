"""The processes that a launcher started: connect them, and report an error of one or all of them once."""

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

_REPORTED = "uptrain/reported"
# Parts of the messages of collectives after another process ended.
_LOST = ("closed by peer", "connection reset", "broken pipe", "gloo")
_WAIT_SECONDS = 3.0
"""Seconds that a process waits for the first process to report the error of both."""


class PeerLost(UptrainError):
    """Another process of the run ended, so this one can't go on."""


def join_processes() -> PartialState:
    """Make and return accelerate's state of this process: its device, its rank and its connection to the others.

    The first call in a process decides for all of accelerate, so no other function makes this state.

    Raises:
        UsageError: torch does not have the device, or the launcher's processes can't connect.
    """
    place, (processes, variable) = devices.device(), devices.launched()
    if processes > 1 and devices.rank() is None:
        raise UsageError(
            f"{variable} says that {processes} processes were launched, but not which of them this is.",
            f"Start them with torchrun or accelerate launch; for one process, unset {variable}.",
        )
    if PartialState._shared_state and not distributed.is_initialized():
        # The state is for another device, or other code made it for one process.
        PartialState._reset_state()
    AcceleratorState._reset_state()
    # The others wait while the first process tokenises, which may take hours.
    timeout = InitProcessGroupKwargs(timeout=timedelta(hours=12)).to_kwargs()
    try:
        with patch_environment(accelerate_torch_device=str(place)):
            state = PartialState(cpu=place.type == "cpu", **timeout)
    except (ValueError, distributed.DistError) as error:
        raise UsageError(
            f"The {processes} processes that were launched can't connect: {' '.join(str(error).split())[:300]}",
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
    """Set ACCELERATE_USE_CPU to what `devices.device` says, for accelerate, which reads the variable several times.

    accelerate fails on an empty value, and on a true one where the command names another device.
    """
    with patch_environment(accelerate_use_cpu=str(devices.device().type == "cpu").lower()):
        yield


@contextmanager
def report_lost_process() -> Iterator[None]:
    """Report in one sentence that another process ended, where a collective of the block fails for that reason.

    Raises:
        PeerLost: another process ended.
    """
    try:
        yield
    except RuntimeError as error:
        alone = not distributed.is_initialized() or distributed.get_world_size() == 1
        if alone or not (isinstance(error, distributed.DistError) or _is_loss(error)):
            raise
        raise PeerLost(
            f"Another process of this run ended, so this one can't go on: {' '.join(str(error).split())[:200]}",
            "Its own message says why; the same command goes on from the last checkpoint.",
        ) from None


def _is_loss(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(word in text for word in _LOST)


def announce(error: UptrainError) -> bool:
    """Return whether this process must print its error: the first always, others only an error of their own."""
    store = _store()
    if not devices.rank():
        if store is not None:
            with contextlib.suppress(RuntimeError):
                store.set(_REPORTED, error.message)
        return True
    # Without a store, the launcher ends this process as soon as the first one has failed.
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(RuntimeError):
            if store is not None and store.check([_REPORTED]):
                return not isinstance(error, PeerLost) and store.get(_REPORTED).decode() != error.message
        time.sleep(0.05)
    return True


def _store() -> Any:
    if not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()
