# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
# mypy: allow-untyped-calls
"""What uptrain's modelling files share: the version check, and parts of configs, models, caches and kernels.

A converted checkpoint holds this file and the one modelling file that imports it. transformers copies both, from a
folder or from the Hub, and save_pretrained writes both. It needs transformers and torch, and not uptrain.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import transformers

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"This model's class needs transformers 5 or newer; here is {transformers.__version__}.")

from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache


class OwnConfig:
    """Write every Auto class into a config's `auto_map`. Comes before the family's config class among the bases.

    save_pretrained by itself names only the class that it saves; vLLM looks for AutoModel, and AutoModel for itself.
    """

    own_auto_map: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("auto_map", dict(self.own_auto_map))
        super().__post_init__(**kwargs)  # type: ignore[misc]


class SharedHeadsConfig(OwnConfig):
    """Check `num_key_value_heads` against the number of query heads; None becomes one per query head.

    `query_heads` is the attribute that holds the number of query heads in the family's config.
    """

    query_heads: ClassVar[str] = "num_attention_heads"
    num_key_value_heads: int | None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        heads = getattr(self, self.query_heads)
        groups = heads if self.num_key_value_heads is None else self.num_key_value_heads
        if groups < 1 or heads % groups:
            raise ValueError(f"num_key_value_heads {groups} does not divide {self.query_heads} {heads}.")
        self.num_key_value_heads = groups


def register_auto_classes(config: Any, model: Any, head_model: Any, auto_class: str = "AutoModelForCausalLM") -> None:
    """Set what `auto_map` says, and let save_pretrained copy the modelling file and this one next to the weights.

    - `config`: the config class, which has `OwnConfig` as a base.
    - `model`: the class that ends with the last hidden states.
    - `head_model`: the class with the language model's head.
    - `auto_class`: the Auto class that loads `head_model`.
    """
    file = config.__module__.rpartition(".")[2]
    classes = {"AutoConfig": config, "AutoModel": model, auto_class: head_model}
    config.own_auto_map = {auto: f"{file}.{each.__name__}" for auto, each in classes.items()}
    for auto, each in classes.items():
        each.register_for_auto_class(auto)


def start_causal_lm(model: Any, parent: type[nn.Module], config: Any) -> None:
    """Initialise `model` as `parent`'s own base class does; `parent` itself would build the whole model once more."""
    super(parent, model).__init__(config)
    # transformers derives it from class names that it knows, and warns at the first loss where it can't.
    model.loss_type = "ForCausalLM"


def cache_argument(attention: type[nn.Module]) -> str:
    """Return under which name this transformers gives a layer the cache: `cache`, or `past_key_values` before 5.24.

    Before 5.24 a layer was also given a `cache`, that of continuous batching, which the kernel takes out of kwargs.

    Raises:
        ImportError: under another name; a layer that leaves its cache empty would write nonsense.
    """
    for name in ("cache", "past_key_values"):
        if name in inspect.signature(attention.forward).parameters:
            return name
    raise ImportError(
        f"transformers {transformers.__version__} gives {attention.__name__} the cache under a name that this file "
        "doesn't know. Use an older transformers, or convert again with a newer uptrain."
    )


class RepeatedHeads:
    """A layer's view of the cache: it keeps the G heads and gives each back for every query head that shares it."""

    def __init__(self, cache: Cache | None, repeats: int) -> None:
        self.cache, self.repeats = cache, repeats

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values, (batch, H, tokens, dim), after adding new ones, (batch, G, tokens, dim)."""
        if self.cache is not None:
            key, value = self.cache.update(key, value, layer_idx, **kwargs)
        return key.repeat_interleave(self.repeats, dim=1), value.repeat_interleave(self.repeats, dim=1)


def repeated_heads_kernel(name: str, eager: Callable[..., Any]) -> str:
    """Register a kernel: `eager` with keys and values (batch, G, tokens, dim) repeated for H query heads.

    Returns `name`, under which transformers finds the kernel.
    """

    def repeated_heads_forward(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        key, value = (each.repeat_interleave(module.num_key_value_groups, dim=1) for each in (key, value))
        return eager(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(name, repeated_heads_forward)
    return name


class ConfigWithKernel:
    """Stand in for a config, and name `kernel` where it names "eager".

    The family's own eager kernel knows no shared heads; all other kernels do.
    """

    def __init__(self, config: Any, kernel: str) -> None:
        self.source, self.kernel = config, kernel

    @property
    def _attn_implementation(self) -> str:
        name = str(self.source._attn_implementation)
        return self.kernel if name == "eager" else name

    def __getattr__(self, name: str) -> Any:
        if name == "source":  # while a copy is made, which has none yet
            raise AttributeError(name)
        return getattr(self.source, name)


def gpt2_eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend in plain products, as GPT-2's eager kernel does, and return output and weights.

    - `module`: the attention layer; with `num_key_value_groups`, each key/value head serves that many query heads.
    - `query`: (batch, heads, tokens, dim).
    - `key`, `value`: (batch, heads or key/value heads, cached tokens, dim).
    - `attention_mask`: added to the logits, broadcast to (batch, heads, tokens, cached tokens).
    - `options`: `scaling` multiplies the logits; `dropout` is the probability of dropping a weight in training.

    The output is (batch, tokens, heads, dim), the weights are (batch, heads, tokens, cached tokens).
    """
    repeats = getattr(module, "num_key_value_groups", 1)
    if repeats > 1:
        key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
    if module.reorder_and_upcast_attn:
        output, weights = module._upcast_and_reordered_attn(query, key, value, attention_mask)
        return output, weights
    weights = torch.matmul(query, key.transpose(-1, -2)) * options["scaling"]
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1).type(value.dtype)
    weights = nn.functional.dropout(weights, p=options.get("dropout", 0.0), training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def fold_heads(states: torch.Tensor) -> torch.Tensor:
    """Line up the heads of (batch, heads, tokens, dim) as queries of one head: (batch, 1, tokens·heads, dim)."""
    return states.transpose(1, 2).flatten(1, 2).unsqueeze(1)


class AbsorbedDecoding:
    """Choose between attending over the cached latent as it is, and expanding it to keys and values first.

    Comes before the attention class among the bases. `latent_sizes` are the widths of what is cached, latent and rotary
    key; `kv_sizes` those of a head's key (without rotary part) and value, which `kv_b_proj` gives.
    """

    config: Any
    kv_b_proj: nn.Linear
    latent_sizes: list[int]
    kv_sizes: list[int]

    def absorbs(self, tokens: int, latent: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        """Tell whether `tokens` queries attend over the cached latent (batch, 1, cached tokens, width) as it is.

        That takes fewer products than expanding every cached token while the queries are few; the result is the same.
        """
        cached, (rank, rope), width = latent.shape[2], self.latent_sizes, sum(self.kv_sizes)
        expanded = cached * (rank * width + tokens * (width + rope))
        absorbed = tokens * (rank * width + cached * 2 * (rank + rope))
        weight = self.kv_b_proj.weight
        return (
            tokens < cached
            and absorbed < expanded
            and self.config._attn_implementation in ("sdpa", "eager")
            # Without a mask several queries mean a prefill into an empty static cache, causal from its first token.
            and (attention_mask is not None or tokens == 1)
            # Adapted, quantized, sharded and offloaded layers can only be called: their weight isn't all there is.
            and type(self.kv_b_proj) is nn.Linear
            and type(weight.data) is torch.Tensor
            and weight.device == latent.device
        )

    def absorb_queries(
        self,
        query: torch.Tensor,
        latent: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return queries, the one key that is also the value, and the mask of attention over the latent itself.

        The keys' up-projection goes into the queries, and the heads' queries stand in one row for the one key.

        - `query`: (batch, heads, tokens, dims without the rotary part).
        - `latent`: (batch, 1, cached tokens, rank).
        - `attention_mask`: (batch, 1, tokens, cached tokens), or None.
        - `rotary`: the rotated parts of queries and key, shaped as `query` and `latent` but for the last dim. None if
          nothing is rotary.

        Source: DeepSeek-AI 2024, DeepSeek-V2, section 2.1.2.
        """
        key_up, _ = self._up_projections()
        query = torch.einsum("bhtd,hdr->bhtr", query, key_up)
        if rotary is not None:
            # expand_output drops the rotary part of the "value": kernels want keys and values of one width.
            query, latent = (torch.cat(parts, dim=-1) for parts in zip((query, latent), rotary, strict=True))
        if attention_mask is not None:
            attention_mask = fold_heads(attention_mask.expand(-1, len(key_up), -1, -1))
        return fold_heads(query), latent, attention_mask

    def expand_output(
        self, output: torch.Tensor, weights: torch.Tensor | None, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return outputs (batch, tokens, heads, dim) and weights by head of what attended over the latent itself.

        - `output`: what the attention returned for the queries of `absorb_queries`.
        - `weights`: likewise; None where the kernel returns none.
        - `tokens`: how many tokens there are queries of.
        """
        _, value_up = self._up_projections()
        output = output.reshape(len(output), tokens, len(value_up), -1)[..., : self.latent_sizes[0]]
        output = torch.einsum("bthr,hvr->bthv", output, value_up)
        if weights is not None:
            weights = weights.reshape(len(weights), tokens, len(value_up), -1).transpose(1, 2)
        return output, weights

    def _up_projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the up-projections of keys (heads, dim, rank) and of values (heads, dim, rank)."""
        up = self.kv_b_proj.weight.unflatten(0, (-1, sum(self.kv_sizes)))
        key_up, value_up = up.split(self.kv_sizes, dim=1)
        return key_up, value_up
