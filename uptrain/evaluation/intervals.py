"""95 % confidence intervals of a mean over text, and of a share of trials.

Intervals over text are blocked over windows, because neighbouring tokens are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL = 1.959964


def interval(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float] | None:
    """Return the 95 % interval of Σ sums / Σ counts, or None for fewer than two blocks.

    A block is one window: `sums` holds the total of each block and `counts` its scored tokens. Windows are taken as
    independent; where one document fills several windows, the true interval is wider.

    Source: Cochran 1977, Sampling Techniques, section 6.4 (variance of a ratio), with Student's t.
    """
    blocks = len(counts)
    if blocks < 2:
        return None
    totals, weights = np.array(sums, dtype=np.float64), np.array(counts, dtype=np.float64)
    mean = totals.sum() / weights.sum()
    residual = np.square(totals - mean * weights).sum()
    half = _t(blocks - 1) * math.sqrt(blocks / (blocks - 1) * residual) / weights.sum()
    return float(mean - half), float(mean + half)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share; it has a width even where all trials have the same result.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    share, squared = successes / trials, _NORMAL**2 / trials
    middle = (share + squared / 2) / (1 + squared)
    half = math.sqrt(share * (1 - share) * squared + squared**2 / 4) / (1 + squared)
    return max(0.0, middle - half), min(1.0, middle + half)


def _t(freedom: int) -> float:
    """Return Student's 97.5 % quantile. Source: Abramowitz & Stegun 1964, 26.7.5, beyond the table."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
