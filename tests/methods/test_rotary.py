import pytest
import torch
from transformers import CohereConfig, GPTJConfig, LlamaConfig, PhiConfig, StableLmConfig
from transformers.models.cohere import modeling_cohere
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.phi import modeling_phi
from transformers.models.stablelm import modeling_stablelm

from uptrain.methods.rotary import Rotary, apply_factor, pair_means, set_complex, to_complex

SCALED = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}
HEADS, DIMS, TOKENS = 3, 16, 40


def by_module(module, config, rotary_class):
    """Return a function that rotates (heads, tokens, D) with a transformers module's own code."""
    embedding = rotary_class(config)
    cos, sin = embedding(torch.zeros(1, TOKENS, 1), torch.arange(TOKENS)[None])

    def rotate(x):
        size = cos.shape[-1]
        turned, _ = module.apply_rotary_pos_emb(x[None, ..., :size], x[None, ..., :size], cos, sin)
        return torch.cat([turned[0], x[..., size:]], dim=-1)

    return rotate


def gptj(dims):
    sinusoids = modeling_gptj.create_sinusoidal_positions(TOKENS, dims)[None]
    sin, cos = sinusoids.chunk(2, dim=-1)

    def rotate(x):
        turned = modeling_gptj.apply_rotary_pos_emb(x[None, ..., :dims].transpose(1, 2), sin, cos)
        return torch.cat([turned[0].transpose(0, 1), x[..., dims:]], dim=-1)

    return rotate


def cases():
    sizes = {"hidden_size": HEADS * DIMS, "num_attention_heads": HEADS, "max_position_embeddings": 64}
    for name, scaling in SCALED.items():
        config = LlamaConfig(**sizes, rope_parameters={"rope_theta": 100.0, **scaling})
        rotate = by_module(modeling_llama, config, modeling_llama.LlamaRotaryEmbedding)
        yield pytest.param(rotate, Rotary("half", DIMS), id=f"llama-{name}")
    config = CohereConfig(**sizes)
    yield pytest.param(
        by_module(modeling_cohere, config, modeling_cohere.CohereRotaryEmbedding),
        Rotary("interleaved", DIMS),
        id="cohere",
    )
    for module, config_class, rotary_class in (
        (modeling_phi, PhiConfig, modeling_phi.PhiRotaryEmbedding),
        (modeling_stablelm, StableLmConfig, modeling_stablelm.StableLmRotaryEmbedding),
    ):
        config = config_class(
            **sizes, rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
        )
        yield pytest.param(by_module(module, config, rotary_class), Rotary("half", 8), id=config.model_type)
    assert GPTJConfig().rotary_dim
    yield pytest.param(gptj(8), Rotary("interleaved", 8), id="gptj")


@pytest.mark.parametrize(("rotate", "rotary"), list(cases()))
def test_complex_factors_commute_with_transformers_own_rotation(rotate, rotary):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(HEADS, DIMS, TOKENS, generator=generator)
    factors = torch.randn(HEADS, rotary.pairs, 2, generator=generator)
    factors = torch.view_as_complex(factors)
    before = rotate(apply_factor(x, rotary, factors).mT)
    after = apply_factor(rotate(x.mT).mT, rotary, factors).mT
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rotate", "rotary"), list(cases()))
def test_a_gauge_move_changes_no_logit(rotate, rotary):
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(HEADS, DIMS, TOKENS, generator=generator) for _ in range(2))
    factors = torch.view_as_complex(torch.randn(HEADS, rotary.pairs, 2, generator=generator))
    factors = factors / factors.abs() * (0.5 + factors.abs()).clamp(max=2)
    logits = rotate(q.mT) @ rotate(k.mT).mT
    moved = rotate(apply_factor(q, rotary, 1 / factors.conj()).mT) @ rotate(apply_factor(k, rotary, factors).mT).mT
    assert (moved - logits).abs().max() < 1e-5 * logits.abs().max()


@pytest.mark.parametrize("rotary", [Rotary("half", 8), Rotary("interleaved", 8), Rotary("half", 6)])
def test_the_complex_view_can_be_undone_and_leaves_the_rest(rotary):
    rows = torch.randn(2, 10, 5, generator=torch.Generator().manual_seed(2))
    pairs = to_complex(rows, rotary)
    assert pairs.shape == (2, rotary.pairs, 5)
    assert torch.equal(set_complex(torch.zeros_like(rows), rotary, pairs)[:, : rotary.dims], rows[:, : rotary.dims])
    assert torch.equal(set_complex(rows, rotary, 2 * pairs)[:, rotary.dims :], rows[:, rotary.dims :])


def test_a_pairs_energy_is_the_mean_of_its_two_dims():
    energy = torch.tensor([1.0, 2, 3, 5])
    assert pair_means(energy, Rotary("half", 4)).tolist() == [2.0, 3.5]
    assert pair_means(energy, Rotary("interleaved", 4)).tolist() == [1.5, 4.0]
