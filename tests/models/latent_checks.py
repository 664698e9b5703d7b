"""What every model with a latent cache must do, whatever its family: checks against the model it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from tests.models.gpt2_models import greedy, left_padded, prompt
from tests.models.test_gpt2_checkpoint import run_python
from uptrain.evaluation.reading import cache_of, with_cache

ROWS = [prompt(1, 11)[0], prompt(1, 4, seed=5)[0], prompt(1, 7, seed=6)[0]]


def randomise(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    """Give seeded weights at a trained model's scale: sharp attention, biases and norms off their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                gain = 1.0 if name.endswith("weight") else 0.0
                parameter.copy_(gain + (0.1 if gain else 0.3) * noise)
            else:
                inputs = parameter.shape[0] if "c_" in name else parameter.shape[-1]  # Conv1D keeps (in, out)
                parameter.copy_(1.5 * noise / inputs**0.5 if "attn" in name else 0.2 * noise)
    return model.eval()


@contextmanager
def always(model: PreTrainedModel, absorbed: bool | None) -> Iterator[list[bool]]:
    """Make every attention absorb or expand where it could do either; None leaves the choice. Yields the choices."""
    kinds = {type(module) for module in model.modules() if hasattr(type(module), "absorbs")}
    choices: list[bool] = []
    before = {kind: kind.absorbs for kind in kinds}

    def choose(self: Any, tokens: int, latent: torch.Tensor, mask: torch.Tensor | None) -> bool:
        possible = mask is not None or tokens == 1
        chosen = before[type(self)](self, tokens, latent, mask) if absorbed is None else absorbed and possible
        choices.append(chosen)
        return chosen

    for kind in kinds:
        kind.absorbs = choose
    try:
        yield choices
    finally:
        for kind, method in before.items():
            kind.absorbs = method


@torch.no_grad()
def logits_are_the_sources(model: PreTrainedModel, source: PreTrainedModel) -> None:
    padded, mask = left_padded(ROWS)
    for ids, options in ((prompt(), {}), (padded, {"attention_mask": mask})):
        mine, theirs = (each(ids, **options).logits for each in (model, source))
        seen = options.get("attention_mask", torch.ones_like(ids)).bool()
        torch.testing.assert_close(mine[seen], theirs[seen], rtol=0, atol=1e-5)
    assert theirs.std() > 1, "weights too small for the comparison to mean anything"


def generates_what_the_source_does(model: PreTrainedModel, source: PreTrainedModel) -> None:
    uncached = greedy(model, prompt(), use_cache=False)
    assert torch.equal(uncached, greedy(source, prompt(), use_cache=False))
    assert torch.equal(greedy(model, prompt()), uncached)
    assert torch.equal(greedy(model, prompt(), cache_implementation="static"), uncached)
    assert torch.equal(
        greedy(model, prompt(), **with_cache(model, StaticCache(model.config, max_cache_len=40))), uncached
    )
    one_token = prompt(2, 1)
    uncached = greedy(model, one_token, use_cache=False)
    assert torch.equal(greedy(model, one_token, cache_implementation="static"), uncached)


def a_padded_batch_generates_what_each_row_does_alone(model: PreTrainedModel, cache: str) -> None:
    ids, mask = left_padded(ROWS)
    batch = greedy(model, ids, attention_mask=mask, cache_implementation=cache)[:, ids.shape[1] :]
    alone = [greedy(model, row[None], use_cache=False)[:, row.numel() :] for row in ROWS]
    assert torch.equal(batch, torch.cat(alone))


def beam_search_finds_what_the_source_finds(model: PreTrainedModel, source: PreTrainedModel) -> None:
    beams: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 3}
    found = greedy(model, prompt(), **beams)
    assert torch.equal(found, greedy(source, prompt(), **beams))
    assert torch.equal(found, greedy(model, prompt(), cache_implementation="static", **beams))
    assert not torch.equal(found[::3], greedy(model, prompt())), "the search never left the greedy path"


def new_cache(model: PreTrainedModel, kind: str) -> DynamicCache | StaticCache:
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=24)


@torch.no_grad()
def in_chunks(
    model: PreTrainedModel, ids: torch.Tensor, chunks: list[int], kind: str, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the logits of ids (batch, tokens) put into the cache in pieces, at the positions their masks give."""
    cache, logits, start = new_cache(model, kind), [], 0
    for tokens in chunks:
        end = start + tokens
        options = {}
        if mask is not None:
            positions = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:]
            options = {"attention_mask": mask[:, :end], "position_ids": positions}
        logits.append(model(ids[:, start:end], **with_cache(model, cache), **options).logits)
        start = end
    return torch.cat(logits, dim=1)


@torch.no_grad()
def chunks_give_what_the_whole_gives(model: PreTrainedModel, kind: str) -> None:
    ids, mask = left_padded(ROWS)
    whole = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False).logits
    unmasked = model(ids, use_cache=False).logits
    for absorbed in (None, True, False):
        for chunks in ([4, 1, 6], [1, 10], [9, 2]):
            with always(model, absorbed):
                mine = in_chunks(model, ids, chunks, kind, mask)
                torch.testing.assert_close(mine[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-5)
                torch.testing.assert_close(in_chunks(model, ids, chunks, kind), unmasked, rtol=0, atol=1e-5)
    chunked = greedy(model, prompt(), prefill_chunk_size=4, cache_implementation=kind)
    assert torch.equal(chunked, greedy(model, prompt(), use_cache=False))


def absorbed_is_expanded(model: PreTrainedModel, ids: torch.Tensor, chunks: list[int], atol: float = 1e-5) -> None:
    """Compare both forms on the same cache, at most one of the chunks a prefill."""
    results = []
    for absorbed in (True, False):
        with always(model, absorbed) as choices:
            results.append(in_chunks(model, ids, chunks, "dynamic"))
        assert absorbed in choices
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=atol)


def a_wrapped_up_projection_is_called_not_read(model: PreTrainedModel) -> None:
    """Adapters stand in for the layer they wrap: its weight is not all it does."""

    class Doubled(torch.nn.Linear):
        def forward(self, latent: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(latent)

    for module in list(model.modules()):
        if hasattr(module, "absorbs"):
            plain = module.kv_b_proj
            module.kv_b_proj = Doubled(plain.in_features, plain.out_features, bias=False)
            module.kv_b_proj.weight = plain.weight
    assert torch.equal(greedy(model, prompt()), greedy(model, prompt(), use_cache=False))


def checkpointing_changes_no_gradient(model: PreTrainedModel) -> None:
    model.train()
    ids = prompt()
    model(ids, labels=ids, use_cache=False).loss.backward()
    plain = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in plain.values())
    model.zero_grad()
    # transformers renamed it between the versions we support, and warns about the old name.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=0, atol=0, msg=name)


def dropout_draws_as_the_source_does(model: PreTrainedModel, source: PreTrainedModel) -> None:
    runs = []
    for each in (model.train(), source.train()):
        torch.manual_seed(0)
        runs.append(each(prompt(), use_cache=False).logits)
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-5)
    assert not torch.allclose(runs[0], model.eval()(prompt()).logits, atol=0.1)


def the_cache_holds_only(model: PreTrainedModel, values: int, layers: int = 2) -> None:
    """Check the bytes of a cache after generate(), dynamic and static: `values` numbers per token and layer."""
    ids = prompt(2, 11)
    options = {"return_dict_in_generate": True, "max_new_tokens": 5}
    dynamic = cache_of(greedy(model, ids, **options))
    static = StaticCache(model.config, max_cache_len=20)
    greedy(model, ids, **with_cache(model, static), **options)
    for cache, places in ((dynamic, 11 + 4), (static, 20)):  # the last token is never put in
        held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        assert {tuple(tensor.shape[:3]) for tensor in held} == {(2, 1, places)}
        assert sum(tensor.untyped_storage().nbytes() for tensor in held) == values * layers * 4 * 2 * places


def attention_maps_have_one_per_head(model: PreTrainedModel, heads: int) -> None:
    ids = prompt(2, 11)
    whole = model(ids, output_attentions=True).attentions
    cache = new_cache(model, "dynamic")
    model(ids[:, :8], **with_cache(model, cache))
    for absorbed in (True, False):
        with always(model, absorbed):
            parts = model(ids[:, 8:], **with_cache(model, cache), output_attentions=True).attentions
        for one, other in zip(whole, parts, strict=True):
            assert tuple(other.shape) == (2, heads, 3, 11)
            torch.testing.assert_close(other, one[:, :, 8:], rtol=0, atol=1e-5)
        cache.crop(-3)


FRESH = """
import sys
sys.modules["uptrain"] = None  # any import of it now fails, installed or not
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, again = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(config).__module__.startswith("transformers_modules."), type(config)
body = AutoModel.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.tensor([[5, 7, 11, 2]])
assert torch.equal(body(ids).last_hidden_state, model.base_model(ids).last_hidden_state)
torch.save((config.to_dict(), model(ids).logits, model.generate(ids, max_new_tokens=6, do_sample=False)), again + ".pt")
model.save_pretrained(again)
assert AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)(ids).logits.isfinite().all()
"""


def loads_in_a_process_without_uptrain(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder / "saved")
    run_python(FRESH, folder / "saved", folder / "again", home=folder)
    config, logits, tokens = torch.load(folder / "again.pt")
    ids = torch.tensor([[5, 7, 11, 2]])
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-6)
    assert torch.equal(tokens, greedy(model, ids, max_new_tokens=6))
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert list((folder / "again").glob("modeling_uptrain_*_mla.py"))
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "v_head_dim"):
        assert config[name] == getattr(model.config, name)
