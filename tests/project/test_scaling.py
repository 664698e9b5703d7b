"""The benchmark that reckons the scaling page knows real models' sizes, and how memory divides over GPUs."""

from __future__ import annotations

import pytest

from benchmarks.scaling import MODELS, memory


def test_parameters_are_those_of_the_published_models() -> None:
    # Llama-2-7B and Llama-3-70B, from their model cards.
    assert [shape.parameters / 1e9 for shape in MODELS] == pytest.approx([6.74, 70.55], rel=2e-3)


def test_one_gpu_holds_everything_and_many_share_it() -> None:
    shape = MODELS[0]
    alone, shared = (memory(shape, gpus, 0, False) for gpus in (1, 8))
    assert alone.states == 16 * shape.parameters
    assert shared.states == alone.states / 8
    assert memory(shape, 8, 0, True).states < shared.states
