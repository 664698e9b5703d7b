"""The moment of attention's averages is the same whichever order of products is the cheaper one."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from uptrain.conversion.calibration.statistics import AveragedMoment


@given(
    heads=st.integers(1, 4),
    tokens=st.integers(1, 12),
    width=st.integers(1, 40),
    part=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
def test_it_is_the_sum_over_heads_and_queries(heads: int, tokens: int, width: int, part: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(heads, tokens, tokens, generator=generator).tril()
    probabilities /= probabilities.sum(-1, keepdim=True)
    rows = torch.randn(tokens, width, generator=generator)
    expected = np.zeros((width, width))
    for head in probabilities.double().numpy():
        for query in head:
            average = query @ rows.double().numpy()
            expected += np.outer(average, average)
    averaged = AveragedMoment(rows, heads)
    for start in range(0, tokens, part):
        averaged.add(probabilities[:, start : start + part, : start + part])
    np.testing.assert_allclose(averaged.moment().numpy(), expected, rtol=1e-4, atol=1e-4)
