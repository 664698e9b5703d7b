"""A layer of our own gets its cache under whatever name transformers has for it, or its file doesn't load."""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mpt.modeling_mpt import MptAttention
from transformers.models.opt.modeling_opt import OPTAttention
from transformers.models.persimmon.modeling_persimmon import PersimmonAttention

from uptrain.evaluation.reading import cache_of, with_cache
from uptrain.models.remote_code.modeling_uptrain_bloom import UptrainBloomAttention, UptrainBloomConfig
from uptrain.models.remote_code.modeling_uptrain_gpt_neo import UptrainGPTNeoConfig, UptrainGPTNeoSelfAttention

PARENTS = {
    "gpt2": GPT2Attention, "gpt2_mla": GPT2Attention, "llama_mla": LlamaAttention, "mpt": MptAttention,
    "opt": OPTAttention, "persimmon": PersimmonAttention,
}  # fmt: skip


@pytest.mark.parametrize("name", PARENTS)
def test_a_file_does_not_load_where_the_cache_has_a_third_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden_states: torch.Tensor, kept: Any = None, **kwargs: Any) -> None: ...

    monkeypatch.setattr(PARENTS[name], "forward", forward)
    spec = find_spec(f"uptrain.models.remote_code.modeling_uptrain_{name}")
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=f"{PARENTS[name].__name__}.*cache"):
        spec.loader.exec_module(module_from_spec(spec))


@pytest.mark.parametrize(
    ("attention", "given"),
    [
        (UptrainBloomAttention(UptrainBloomConfig(hidden_size=8, n_head=2), 0), (torch.zeros(1, 1, 8),) * 4),
        (UptrainGPTNeoSelfAttention(UptrainGPTNeoConfig(hidden_size=8, num_heads=2), "global", 0), ()),
    ],
    ids=["bloom", "gpt_neo"],
)
def test_a_layer_whose_own_class_calls_it_otherwise_must_be_given_one_or_none(attention: Any, given: Any) -> None:
    with pytest.raises(TypeError, match=r"missing 1 required .+'layer_past'"):
        attention(*given or (torch.zeros(1, 1, 8),), renamed=DynamicCache())


def test_a_model_is_given_its_cache_as_its_own_forward_says() -> None:
    class Older:
        def forward(self, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> None: ...

    class Newer:
        def forward(self, input_ids: Any, cache: Any = None, **kwargs: Any) -> None: ...

    cache = DynamicCache()
    assert with_cache(Older(), cache) == {"past_key_values": cache}
    assert with_cache(Newer(), cache) == {"cache": cache}
    assert cache_of(BaseModelOutputWithPast(past_key_values=cache)) is cache
