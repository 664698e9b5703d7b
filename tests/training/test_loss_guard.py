"""A step is taken unless its loss or gradient can't be used, and what is skipped is counted across a resumption."""

from __future__ import annotations

import math
from typing import Any

import pytest

from uptrain.errors import UptrainError
from uptrain.training import recipes
from uptrain.training.loss_guard import LossGuard


def guard(**changes: Any) -> LossGuard:
    values = {"model": "m", "output": "o", "data": ["a.txt"], "steps": 100, "batch_size": 4, "on_bad_loss": "skip"}
    return LossGuard(recipes.parse_recipe({**values, **changes}))


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_a_number_that_is_not_finite_is_skipped_and_named(loss: float, norm: float) -> None:
    checked = guard()
    assert checked.check(1, 2.0, 1.0) == ""
    reason = checked.check(2, loss, norm)
    assert "at step 2, on sequences 4 to 7" in reason
    assert checked.skipped == 1
    with pytest.raises(UptrainError, match="step 3"):
        guard(on_bad_loss="stop").check(3, loss, norm)


def test_a_spike_is_measured_against_the_median_of_ten_steps_and_more() -> None:
    checked = guard(spike=3.0)
    for step in range(1, 10):
        assert checked.check(step, 100.0 if step == 5 else 2.0, 1.0) == ""
    # Nine losses are too few to call anything a spike.
    assert checked.check(10, 50.0, 1.0) == ""
    assert "usual 2" in checked.check(11, 6.1, 1.0)
    assert checked.check(12, 5.9, 1.0) == ""


def test_the_tenth_skipped_step_in_a_row_ends_the_run() -> None:
    checked = guard()
    for step in range(1, 10):
        assert checked.check(step, math.nan, 1.0)
    assert checked.check(10, 1.0, 1.0) == "", "a good step begins another row"
    for step in range(11, 20):
        assert checked.check(step, math.nan, 1.0)
    with pytest.raises(UptrainError, match="10th in a row"):
        checked.check(20, math.nan, 1.0)


def test_a_resumed_run_compares_with_the_same_losses() -> None:
    first = guard(spike=2.0)
    for step in range(1, 13):
        first.check(step, 1.0 + step / 100, 1.0)
    first.check(13, math.nan, 1.0)
    resumed = guard(spike=2.0)
    resumed.load_state_dict(first.state_dict())
    assert resumed.skipped == 1
    assert resumed.check(14, 2.3, 1.0) == first.check(14, 2.3, 1.0) != ""
