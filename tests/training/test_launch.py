"""A launch joins all its processes or says why not, and every process that fails says so once and by its exit code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import distributed

from tests.corpus import NO_DROPOUT, checkpoint, corpus
from uptrain.errors import UptrainError, UsageError
from uptrain.models import devices
from uptrain.training import launch, recipes
from uptrain.training.run import train

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin and end as a process that nothing launched."""
    for name in (*VARIABLES, "ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_a_launcher_that_does_not_number_its_processes_is_refused(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "2")
    with pytest.raises(UsageError, match=variable):
        launch.join_processes()


def test_a_process_that_sees_fewer_than_were_launched_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    # A device that accelerate connects no processes on: it would train on one, twice.
    monkeypatch.setattr(devices, "device", lambda: torch.device("meta"))
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"2 .*\b1\b"):
        launch.join_processes()


@pytest.mark.parametrize("early", [False, True])
def test_processes_meet_on_the_cpu_and_wait_for_hours(early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ACCELERATE_USE_CPU too, and though something made a state of one process earlier."""
    if early:
        PartialState()
    seen: dict[str, Any] = {}

    def meet(**named: Any) -> None:
        seen.update(named)
        raise ConnectionError

    monkeypatch.setattr(distributed, "init_process_group", meet)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    for name, value in zip((*VARIABLES, "OMP_NUM_THREADS"), ("1", "2", "1", "2", "127.0.0.1", "0", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConnectionError):
        launch.join_processes()
    assert seen["backend"] == "gloo"
    assert seen["timeout"] == timedelta(hours=12)
    assert (seen["rank"], seen["world_size"]) == (1, 2)


def test_an_incomplete_launch_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ("1", "2", "1", "1", "", ""), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="MASTER_ADDR"):
        launch.join_processes()


@pytest.mark.slow
@pytest.mark.parametrize("said", ["", "false"])
def test_a_variable_that_does_not_say_yes_trains_all_the_same(
    said: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", said)
    done = train(recipes.load_recipe(str(recipe), ["steps=1"]))
    assert done is not None and done.num_processes == 1
    assert os.environ["ACCELERATE_USE_CPU"] == said


def test_a_process_may_train_on_one_device_and_then_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.join_processes().device == torch.device("cpu")
    monkeypatch.setattr(devices, "device", lambda: torch.device("meta"))
    assert launch.join_processes().device == torch.device("meta")


class Store(dict[str, bytes]):
    """What connects processes."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def test_the_first_speaks_for_all_and_another_of_what_only_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    store, both = Store(), UptrainError("The disk is full.")
    monkeypatch.setattr(launch, "_store", lambda: store)
    monkeypatch.setattr(launch, "_WAIT_SECONDS", 0.1)
    monkeypatch.setenv("RANK", "1")
    assert launch.announce(both), "the first has said nothing"
    monkeypatch.setenv("RANK", "0")
    assert launch.announce(both)
    monkeypatch.setenv("RANK", "1")
    assert not launch.announce(both)
    assert not launch.announce(launch.PeerLost("Another process is gone."))
    assert launch.announce(UptrainError("This process's memory is full."))


@pytest.mark.parametrize("reason", ["[gloo] Connection closed by peer [127.0.0.1]:4711", "Connection reset by peer"])
def test_a_lost_process_is_one_sentence_and_other_errors_are_not(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="peer"), launch.report_lost_process():
        raise RuntimeError(reason)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    with pytest.raises(launch.PeerLost, match="Another process"), launch.report_lost_process():
        raise RuntimeError(reason)
    with pytest.raises(RuntimeError, match="shapes"), launch.report_lost_process():
        raise RuntimeError("shapes don't fit")


def start(rank: int, port: int, *arguments: str, code: str = "") -> subprocess.Popen[str]:
    environment = {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    command = [sys.executable, *(["-c", code] if code else ["-m", "uptrain"]), "train", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Write a recipe on a tiny checkpoint."""
    checkpoint(tmp_path / "model", **NO_DROPOUT)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "model": str(tmp_path / "model"), "output": str(tmp_path / "out"), "block_size": 32, "batch_size": 4,
        "data": [str(corpus(tmp_path / "text.txt"))], "steps": 400, "learning_rate": 1e-3,
    }))  # fmt: skip
    return path


@pytest.mark.slow
def test_what_fails_on_all_exits_by_its_kind_on_all_and_is_said_once(recipe: Path) -> None:
    port = free_port()
    both = [start(rank, port, str(recipe), "batch_size=3") for rank in (0, 1)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [2, 2]
    assert "batch_size 3" in said[0]
    assert "batch_size" not in said[1]


@pytest.mark.slow
def test_what_fails_on_another_alone_is_said_by_it_and_the_first_ends_too(recipe: Path, tmp_path: Path) -> None:
    port = free_port()
    first, other = start(0, port, str(recipe)), start(1, port, str(recipe))
    log = tmp_path / "out.run" / "train_log.jsonl"
    while first.poll() is None and not log.exists():
        time.sleep(0.02)
    os.kill(other.pid, signal.SIGKILL)
    said = first.communicate()[1]
    other.communicate()
    assert first.returncode == 1
    assert "Another process" in said and "Traceback" not in said
    broken = start(1, port, str(recipe), "steps=0")
    assert "Process 1 of 2" in broken.communicate()[1]
    assert broken.returncode == 2


@pytest.mark.slow
def test_a_launched_process_ends_before_threads_of_its_connection_can_abort_it(recipe: Path) -> None:
    """What an interpreter does last never comes: there such a thread would abort a run that is done."""
    code, port = "import atexit, os; atexit.register(os.abort); from uptrain.__main__ import main; main()", free_port()
    both = [start(rank, port, str(recipe), "steps=1", code=code) for rank in (0, 1)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert (recipe.parent / "out" / "config.json").is_file()
    assert subprocess.run([sys.executable, "-c", code, "families"], capture_output=True).returncode == -signal.SIGABRT
