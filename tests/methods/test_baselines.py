import pytest
import torch

from benchmarks.baselines import mean_renormed, procrustes
from tests.methods.layers import attention, random_layer, random_moment
from uptrain.methods.low_rank import gram
from uptrain.methods.rotary import Rotary

POSITIONS = {"free": None, "half": Rotary("half", 8), "partial": Rotary("interleaved", 4)}


@pytest.mark.parametrize("moment", [None, random_moment(16, 0)], ids=["weights", "text"])
def test_renormed_heads_have_the_mean_energy_of_their_group(moment):
    layer = random_layer(8, 8, 8, 16, 0)
    pooled = mean_renormed(layer, 2, moment)
    for group, rows in enumerate(pooled.k_rows):
        before = [float(gram(block, moment).trace()) for block in layer.k_rows[4 * group : 4 * group + 4]]
        assert float(gram(rows, moment).trace()) == pytest.approx(sum(before) / 4)
        shape = layer.k_rows[4 * group : 4 * group + 4].mean(0)
        torch.testing.assert_close(rows / rows.norm(), shape / shape.norm())


@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("moment", [None, random_moment(16, 1)], ids=["weights", "text"])
def test_procrustes_undoes_rotations_that_attention_cannot_see(position, moment):
    one = random_layer(4, 1, 8, 16, 1)
    generator = torch.Generator().manual_seed(1)
    turns = [torch.eye(8, dtype=torch.float64), _turn(position, generator)]
    mixes = [
        torch.eye(8, dtype=torch.float64),
        torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0],
    ]
    layer = random_layer(4, 2, 8, 16, 2).with_rows(
        k_rows=torch.cat([turn @ one.k_rows for turn in turns]), v_rows=torch.cat([mix @ one.v_rows for mix in mixes])
    )
    x = torch.randn(9, 16, generator=generator, dtype=torch.float64)
    merged = procrustes(layer, 1, position, moment)
    torch.testing.assert_close(attention(merged, x, position), attention(layer, x, position), rtol=1e-7, atol=1e-8)
    renormed = procrustes(layer, 1, position, moment, renorm=True)
    torch.testing.assert_close(renormed.k, merged.k, rtol=1e-7, atol=1e-8)


def _turn(position, generator):
    """Return a random orthogonal (8, 8) map that commutes with the position's rotation."""
    if position is None:
        return torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    turn = torch.eye(8, dtype=torch.float64)
    real, imaginary = position.indices()
    angles = torch.rand(position.pairs, generator=generator, dtype=torch.float64) * 6
    turn[real, real] = turn[imaginary, imaginary] = angles.cos()
    turn[imaginary, real], turn[real, imaginary] = angles.sin(), -angles.sin()
    return turn
