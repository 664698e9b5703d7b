"""An interval holds the true mean as often as it says, and is the textbook's where the textbook has one."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from uptrain.evaluation.intervals import interval


# Source: Student's t, 97.5 %, as printed in NIST/SEMATECH e-Handbook, table 1.3.6.7.2.
@pytest.mark.parametrize(
    ("blocks", "t"), [(2, 12.706), (3, 4.303), (11, 2.228), (12, 2.201), (31, 2.042), (101, 1.984)]
)
def test_equal_blocks_give_student_s_interval(blocks: int, t: float) -> None:
    values = np.random.default_rng(blocks).normal(3, 1, blocks).tolist()
    found = interval([10 * value for value in values], [10] * blocks)
    half = t * statistics.stdev(values) / blocks**0.5
    assert found == pytest.approx((statistics.mean(values) - half, statistics.mean(values) + half), rel=1e-3)


def test_it_covers_the_truth_nineteen_times_in_twenty_also_for_unequal_windows() -> None:
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        counts = draw.integers(200, 1000, 24)
        # What tokens of one window have in common is most of their variance.
        means = draw.normal(2, 0.5, 24)
        low, high = interval((means * counts).tolist(), counts.tolist()) or (0, 0)
        held += low <= 2 <= high
    assert 0.925 < held / 2000 < 0.97


def test_one_window_has_none() -> None:
    assert interval([3.0], [100]) is None
