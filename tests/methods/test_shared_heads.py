import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.layers import attention, random_layer, random_moment
from uptrain.methods.rotary import Rotary
from uptrain.methods.shared_heads import factor_heads

POSITIONS = {
    "free": None,
    "half": Rotary("half", 8),
    "interleaved": Rotary("interleaved", 8),
    "partial": Rotary("half", 4),
}


@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_as_many_groups_as_heads_is_the_identity(position, calibrated):
    layer = random_layer(8, 4, 8, 24, 0)
    moment = random_moment(24, 0) if calibrated else None
    assert factor_heads(layer, 4, position, moment).layer is layer


@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("calibrated", [False, True])
@given(
    groups=st.sampled_from([1, 2, 4]),
    per=st.integers(1, 2),
    seed=st.integers(0, 1000),
    biases=st.booleans(),
    alike=st.floats(0, 1),
)
@settings(max_examples=25, deadline=None)
def test_no_pooling_keeps_more_weighted_energy(position, calibrated, groups, per, seed, biases, alike):
    layer = random_layer(8 * per, 8, 8, 12, seed, biases, alike)
    kept = factor_heads(layer, groups, position, random_moment(12, seed) if calibrated else None).explained
    best = kept.pop("calibrated" if calibrated else "svd")
    assert set(kept) == {"mean", "first"}
    for other in kept.values():
        assert best.keys >= other.keys - 1e-9
        assert best.values >= other.values - 1e-9
    assert 0 <= best.keys <= 1 + 1e-12
    assert 0 <= best.values <= 1 + 1e-12


@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)
def test_heads_that_differ_by_a_gauge_move_merge_without_loss(position):
    layer = random_layer(4, 1, 8, 24, 3)
    twins = random_layer(8, 2, 8, 24, 4)
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    turn = _commuting(position, generator)
    layer = twins.with_rows(
        q_rows=twins.q_rows,
        k_rows=torch.cat([layer.k_rows, turn @ layer.k_rows]),
        v_rows=torch.cat([layer.v_rows, mix @ layer.v_rows]),
    )
    x = torch.randn(10, 24, generator=generator, dtype=torch.float64)
    for moment in (None, random_moment(24, 3)):
        merged = factor_heads(layer, 1, position, moment)
        assert merged.layer.k.shape[0] == merged.layer.v.shape[0] == 1
        torch.testing.assert_close(
            attention(merged.layer, x, position), attention(layer, x, position), rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)
def test_text_makes_the_layers_output_better_than_weights_alone(position):
    errors = {"svd": 0.0, "calibrated": 0.0, "mean": 0.0}
    for seed in range(6):
        layer = random_layer(4, 4, 8, 24, seed, alike=0.5)
        generator = torch.Generator().manual_seed(seed)
        scale = torch.logspace(0, -2, 24, dtype=torch.float64)
        x = torch.randn(2000, 24, generator=generator, dtype=torch.float64) * scale + 0.3 * scale.flip(0)
        rows = torch.cat([x, torch.ones(2000, 1, dtype=torch.float64)], dim=1)
        target = attention(layer, x[:100], position)
        pooled = layer.with_rows(k_rows=layer.k_rows.mean(0, keepdim=True), v_rows=layer.v_rows.mean(0, keepdim=True))
        candidates = {
            "svd": factor_heads(layer, 1, position).layer,
            "calibrated": factor_heads(layer, 1, position, rows.mT @ rows / 2000).layer,
            "mean": pooled,
        }
        for name, candidate in candidates.items():
            errors[name] += float((attention(candidate, x[:100], position) - target).square().sum())
    assert errors["calibrated"] < errors["svd"] < errors["mean"]


def test_a_layer_without_biases_gets_none():
    layer = factor_heads(random_layer(4, 4, 8, 16, 0, biases=False), 2, None, random_moment(16, 0)).layer
    assert layer.q_bias is None
    assert layer.k_bias is None
    assert layer.v_bias is None
    assert layer.k.shape == (2, 8, 16)


def test_a_group_count_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"groups .*3.*4"):
        factor_heads(random_layer(4, 4, 8, 16, 0), 3, None)


def _commuting(position, generator):
    """Return a random (8, 8) map that commutes with the position's rotation."""
    if position is None:
        return torch.randn(8, 8, generator=generator, dtype=torch.float64)
    real, imaginary = position.indices()
    turn = torch.zeros(8, 8, dtype=torch.float64)
    a, b = torch.randn(2, position.pairs, generator=generator, dtype=torch.float64)
    turn[real, real], turn[imaginary, imaginary], turn[imaginary, real], turn[real, imaginary] = a, a, b, -b
    rest = slice(position.dims, None)
    turn[rest, rest] = torch.randn(8 - position.dims, 8 - position.dims, generator=generator, dtype=torch.float64)
    return turn
