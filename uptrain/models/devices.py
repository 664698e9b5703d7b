"""Where numbers are computed, and how: the device, its precision, its random state, and what happens when it is full.

Every command asks here. What needs no torch works without it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from uptrain.errors import UptrainError, UsageError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
"""The name that asks for the machine's own device."""
_WORDS = "Say auto, cpu, cuda, cuda:1, mps, or another device that torch has here."
_TRUE = ("1", "true", "yes", "on", "y", "t")
_FALSE = ("0", "false", "no", "off", "n", "f")
_FULL = re.compile(
    r"out of memory|can.?t allocate memory|cannot allocate memory|not enough memory|ALLOC_FAILED|invalid buffer size",
    re.IGNORECASE,
)
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_choice: list[str | None] = [None]
"""The names given to `using`, innermost last."""


class OutOfMemory(UptrainError):
    """A device, or the machine, has less memory than the work takes."""


@contextmanager
def using(name: str | None) -> Iterator[None]:
    """Compute on the device of that name for as long as the block runs; None changes nothing, `auto` chooses again.

    Raises:
        UsageError: torch has no such device here, or is not installed.
    """
    _choice.append(_choice[-1] if name is None else name)
    try:
        if name not in (None, AUTO):
            try:
                device()
            except ImportError:
                raise UsageError(f"--device {name} needs torch.", "pip install 'uptrain[train]'") from None
        yield
    finally:
        _choice.pop()


def chosen() -> str | None:
    """Return the name of the device that was given to `using`, None where the choice is free."""
    return None if _choice[-1] == AUTO else _choice[-1]


def launched() -> tuple[int, str]:
    """Return how many processes a launcher says that it started, and the variable that says so."""
    for name in _SIZES:
        if (os.environ.get(name) or "").isdigit():
            return int(os.environ[name]), name
    return 1, ""


def rank() -> int | None:
    """Return which of the launched processes this is, counted from 0; None where no launcher says it."""
    return next((int(os.environ[name]) for name in _RANKS if (os.environ.get(name) or "").isdigit()), None)


def device() -> torch.device:
    """Return the device that everything is computed on.

    It is the one that `using` names, else the CPU where ACCELERATE_USE_CPU is true, else ACCELERATE_TORCH_DEVICE, else
    the accelerator that there is, else the CPU. Of several alike, each process of a launch gets its own.

    Raises:
        UsageError: torch has no device of that name here, or ACCELERATE_USE_CPU is neither true nor false.
    """
    import torch

    for name, asked in (
        ("--device", chosen()),
        ("ACCELERATE_USE_CPU", "cpu" if _flag("ACCELERATE_USE_CPU") else None),
        ("ACCELERATE_TORCH_DEVICE", os.environ.get("ACCELERATE_TORCH_DEVICE")),
    ):
        if asked:
            return _of_this_process(_existing(asked, name))
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else _of_this_process(found)


def _flag(name: str) -> bool:
    """Tell whether a variable of accelerate's says yes, in accelerate's words; unset and empty are no.

    Raises:
        UsageError: it says neither.
    """
    said = os.environ.get(name, "").strip().lower()
    if said and said not in (*_TRUE, *_FALSE):
        raise UsageError(f"{name} is {said!r}, neither true nor false.", f"Set {name} to true, or unset it.")
    return said in _TRUE


def _existing(name: str, option: str) -> torch.device:
    import torch

    try:
        found = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{option} {name} is no device of torch.", _WORDS) from None
    if found.type == "cpu":
        return torch.device("cpu")
    try:
        module = torch.get_device_module(found)
        count = module.device_count() if module.is_available() else 0
    except (RuntimeError, AttributeError):
        count = 0
    if (found.index or 0) >= count:
        raise UsageError(f"{option} {name} is not on this machine, which has {count} of its kind.", _WORDS)
    return found


def _of_this_process(found: torch.device) -> torch.device:
    import torch

    local, processes = int(os.environ.get("LOCAL_RANK", "-1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if found.type == "cpu" or local < 0 or processes == 1:
        return found
    if found.index is not None:
        raise UsageError(
            f"The device {found} is one, and {processes} processes were launched on this machine.",
            f"Say {found.type}, so that each process takes its own.",
        )
    return torch.device(found.type, local % torch.get_device_module(found).device_count())


def has_fast_bf16(place: torch.device) -> bool:
    """Tell whether a device multiplies bfloat16 matrices in hardware; where it doesn't, fp32 is many times faster."""
    import torch

    if place.type == "cpu":
        return _cpu_has_bf16()
    ask: Callable[..., bool] | None = getattr(torch.get_device_module(place), "is_bf16_supported", None)
    if ask is None:
        return True
    try:
        return bool(ask(including_emulation=False))
    except TypeError:
        return bool(ask())


@cache
def _cpu_has_bf16() -> bool:
    """Ask the CPU itself: oneDNN's own answer counts AVX-512 without such instructions, and emulates them."""
    import torch

    usable = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if usable is None or not usable():
        return False
    # Where oneDNN is set to use fewer instructions, the CPU's list says nothing.
    capped = any(os.environ.get(f"{name}_MAX_CPU_ISA") for name in ("ONEDNN", "DNNL"))
    return _bf16_instructions({} if capped else torch.cpu.get_capabilities(), _bf16_is_faster)


def _bf16_instructions(capabilities: Mapping[str, Any], measure: Callable[[], bool]) -> bool:
    """Tell what a CPU's list of instructions says of bfloat16 products; ask `measure` where it says nothing."""
    # AVX-NE-CONVERT converts only, so it doesn't count. SVE's or ARM's plain ones do.
    known = [name for name in capabilities if "bf16" in name]
    if not known:
        return measure()
    return any(capabilities[name] for name in known)


def _bf16_is_faster() -> bool:
    import torch

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(384, 384, dtype=dtype)
        taken = []
        for _ in range(5):
            started = time.perf_counter()
            matrix @ matrix
            taken.append(time.perf_counter() - started)
        return min(taken)

    return seconds(torch.bfloat16) < seconds(torch.float32)


def precision(wanted: str, place: torch.device) -> str:
    """Return the precision that products are computed in, bf16 or fp32; `auto` is bf16 where hardware has it."""
    return wanted if wanted != AUTO else "bf16" if has_fast_bf16(place) else "fp32"


def scoring_dtype(wanted: torch.dtype | None, place: torch.device) -> torch.dtype | None:
    """Return the dtype that quality is computed in: as wanted, else float32 on a CPU, else None, the checkpoint's."""
    import torch

    return wanted or (torch.float32 if place.type == "cpu" else None)


@contextmanager
def full_fp32() -> Iterator[None]:
    """Compute fp32 products as fp32 for as long as the block runs, whatever the process has allowed (TF32, bf16)."""
    import torch

    kinds: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn)
    backends = [kind.matmul for kind in kinds] + [getattr(torch.backends.cudnn, "conv")]  # noqa: B009, its type lacks it
    earlier = [each.fp32_precision for each in backends]
    try:
        for each in backends:
            each.fp32_precision = "ieee"
        yield
    finally:
        for each, value in zip(backends, earlier, strict=True):
            each.fp32_precision = value


def random_state(place: torch.device) -> dict[str, Any]:
    """Return the state of the generators of the CPU and of a device, to be restored by `set_random_state`."""
    import torch

    ask = None if place.type == "cpu" else getattr(torch.get_device_module(place), "get_rng_state", None)
    return {"cpu": torch.get_rng_state(), "device": None if ask is None else ask(place)}


def set_random_state(state: dict[str, Any], place: torch.device) -> None:
    """Restore what `random_state` returned; the device's part only on a device that has one."""
    import torch

    torch.set_rng_state(state["cpu"])
    put = None if place.type == "cpu" else getattr(torch.get_device_module(place), "set_rng_state", None)
    if put is not None and state["device"] is not None:
        put(state["device"], place)


@contextmanager
def seeded(seed: int, place: torch.device) -> Iterator[None]:
    """Draw random numbers from `seed` in the block, on the CPU and the device; then go on as before."""
    import torch

    earlier = random_state(place)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(earlier, place)


def is_full(error: BaseException) -> bool:
    """Tell whether an error says that a device, or the machine, has no memory left; backends say it in many ways."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _FULL.search(str(error)) is not None


@contextmanager
def enough_memory(what: str, hint: str) -> Iterator[None]:
    """Turn what any backend raises when its memory is full into one sentence: `what` needed it, `hint` is the remedy.

    Raises:
        OutOfMemory: the block ran out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
        reason = " ".join(str(error).split())[:200]
        said = f": {reason}" if reason else "."
        raise OutOfMemory(f"{what} ran out of memory on {_where()}{said}", hint) from None


def _where() -> str:
    try:
        return str(device())
    except UsageError:
        return "the device"
