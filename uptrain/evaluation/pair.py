"""The one or two models of an evaluation: a model and its baseline, loaded on one device, and the texts they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from uptrain.checkpoint.folder_digest import weights_digest
from uptrain.checkpoint.source import Source
from uptrain.data.sources import text_name
from uptrain.data.token_text import TokenText, read_tokens
from uptrain.errors import UsageError
from uptrain.evaluation.contexts import PositionLimit
from uptrain.evaluation.reading import has_encoder
from uptrain.evaluation.reference import Reference
from uptrain.evaluation.settings import EvaluationSettings
from uptrain.models import devices, loading
from uptrain.models.checks import check_heads, check_tokens, longest_context
from uptrain.models.opened import OpenedModel, open_model
from uptrain.models.precision import dtype_named, place_model

_UNLIMITED = 2**31
"""Positions of a model whose config counts none."""


@dataclass(frozen=True, kw_only=True)
class ModelPair:
    """A model and, where there is one, its baseline. Every tuple has the model's entry first.

    - `names`: what the user called each model.
    - `models`: transformers' models in eval mode.
    - `tokenizers`: transformers' tokenizers; they give the same tokens.
    - `texts`: the tokens of each text, by the text's name.
    - `reference`: the baseline with its stored logits, or None.
    - `weights`: digest of the model's weights and config.
    - `dtypes`: the dtype of each checkpoint.
    - `device`: where the models are.
    """

    names: tuple[str, ...]
    models: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    texts: Mapping[str, TokenText]
    reference: Reference | None
    weights: str
    dtypes: tuple[torch.dtype, ...]
    device: torch.device

    @property
    def dtype(self) -> str:
        """Return the name of the model's present dtype, such as bfloat16."""
        return str(self.models[0].dtype).removeprefix("torch.")

    @property
    def has_encoder(self) -> bool:
        """Tell whether the model is an encoder-decoder."""
        return has_encoder(self.models[0])

    @property
    def first_text(self) -> TokenText:
        """Return the tokens of the first text."""
        return next(iter(self.texts.values()))

    def limit(self, reserved: int = 0) -> PositionLimit:
        """Return the limit of the model with the fewest positions, `reserved` of which are not for a context."""
        found = zip(self.models, self.names, strict=True)
        positions, name = min((longest_context(model) or _UNLIMITED, name) for model, name in found)
        return PositionLimit(positions=positions, name=name, reserved=reserved)

    def place_as_served(self) -> None:
        """Put each model into its checkpoint's dtype."""
        for model, dtype in zip(self.models, self.dtypes, strict=True):
            place_model(model, None, dtype)

    def place_for_speed(self) -> None:
        """Put models of bfloat16 into float32 where the device can't multiply bfloat16 in hardware."""
        if not devices.has_fast_bf16(self.device):
            for model in self.models:
                if model.dtype is torch.bfloat16:
                    place_model(model, None, torch.float32)


@dataclass(frozen=True, kw_only=True)
class ModelPairSource:
    """Checkpoints of a model and its baseline that were checked, with the texts, before the weights are read.

    - `opened`: the checkpoints, the model's first.
    - `reference`: the baseline with its stored logits, or None.
    - `tokenizers`: transformers' tokenizers; they give the same tokens.
    - `texts`: the tokens of each text, by the text's name.
    """

    opened: tuple[OpenedModel, ...]
    reference: Reference | None
    tokenizers: tuple[Any, ...]
    texts: Mapping[str, TokenText]

    def load(self, dtype: str | None) -> ModelPair:
        """Load the models onto the device, in the dtype of the quality measurement.

        `dtype` is float32, bfloat16 or float16; None is float32 on a CPU, elsewhere each checkpoint's own.

        Raises:
            CheckpointError: a model can't be loaded.
            UsageError: a text has tokens that a model has no embedding of.
        """
        device = devices.device()
        wanted = devices.scoring_dtype(dtype_named(dtype), device)
        weights = weights_digest(self.opened[0].source.path)
        models = [loading.load_model(self.opened[0])]
        if self.reference is not None:
            models.append(self.reference.load(lambda: loading.load_model(self.opened[1])))
        dtypes = tuple(model.dtype for model in models)
        placed = tuple(place_model(model, device, wanted or model.dtype).eval() for model in models)
        for model, text in product(placed, self.texts.values()):
            check_tokens(model, text.ids)
        return ModelPair(
            names=tuple(each.name for each in self.opened), models=placed, tokenizers=self.tokenizers,
            texts=self.texts, reference=self.reference, weights=weights, dtypes=dtypes, device=device,
        )  # fmt: skip


def open_pair(source: Source, reference: Reference | None, settings: EvaluationSettings) -> ModelPairSource:
    """Check that two checkpoints can be compared and read the texts with their tokenizers.

    Raises:
        CheckpointError: weights can't be read, or there is no tokenizer.
        UsageError: a model without a language-model head, a text that is too short, or two tokenizers that differ.
    """
    sources = (source, *([reference.source] if reference else []))
    opened = tuple(map(open_model, sources))
    check_heads(*opened)
    tokenizers = tuple(loading.load_tokenizer(each.path) for each in sources)
    texts = {}
    for text in settings.text:
        name = text_name(text)
        read = [read_tokens([text], tokenizer, settings.tokens) for tokenizer in tokenizers]
        if reference is not None and not _same(read[0], read[1]):
            raise UsageError(
                f"{source.name} and {sources[1].name} have different tokenizers, so their tokens can't be compared.",
                "Compare models that have one tokenizer.",
            )
        texts[name] = read[0]
    return ModelPairSource(opened=opened, reference=reference, tokenizers=tokenizers, texts=texts)


def _same(one: TokenText, other: TokenText) -> bool:
    return len(one.ids) == len(other.ids) and bool((one.ids == other.ids).all())
