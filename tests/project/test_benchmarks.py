"""Every benchmark is one command of `python -m benchmarks`, and what they share keeps its words."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.__main__ import names
from benchmarks.common import OPTIONS, ROOT, Llama, options, table, timed

NEEDS = {"fuzz_atheris": "atheris"}
"""What a benchmark needs that the development environment does not hold."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(names()) - set(NEEDS)))
def test_each_says_what_it_measures_and_how_it_is_called(name: str) -> None:
    command = [sys.executable, "-m", "benchmarks", name, "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"usage: python -m benchmarks {name}")
    assert f"python -m benchmarks {name}" in shown.partition("\n\n")[2]


def test_a_name_that_is_none_is_refused_with_those_that_are() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "fidelity" in done.stderr and "Traceback" not in done.stderr
    listed = subprocess.run([sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(name in listed.stdout for name in names())


def test_the_tensors_of_a_made_up_llama_are_those_of_its_class() -> None:
    llama = Llama(2, 48, 64, 32, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**llama.config()))
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == llama.tensors()


def test_a_shared_option_can_be_changed_and_a_misspelt_one_is_noticed() -> None:
    parser = options("--out", "--calibration-tokens", calibration_tokens={"default": 7})
    assert parser.parse_args([]).calibration_tokens == 7
    assert parser.parse_args([]).out is None
    assert OPTIONS["--calibration-tokens"]["default"] == 65_536
    with pytest.raises(AssertionError, match="repair_steps"):
        options("--out", repair_steps={"default": 1})
    assert isinstance(parser, argparse.ArgumentParser)


def test_a_table_is_markdown() -> None:
    assert table({"a": "left", "b": "right"}, [(1, "x")]) == "| a | b |\n|---|---:|\n| 1 | x |"


def test_a_timer_stops_with_its_block() -> None:
    with timed() as timer:
        during = timer.seconds
    assert 0 <= during <= timer.seconds == timer.seconds
