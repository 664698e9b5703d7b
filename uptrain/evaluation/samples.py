"""Samples: what each model writes after the same openings of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from uptrain.checkpoint.events import Events
from uptrain.data.block_reader import Tokens
from uptrain.data.text_encoder import TextEncoder
from uptrain.errors import UsageError
from uptrain.evaluation.pair import ModelPair
from uptrain.evaluation.progress import counted
from uptrain.evaluation.reading import cache_of, with_cache
from uptrain.evaluation.settings import EvaluationSettings
from uptrain.models import devices

PROMPT_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt, and what greedy decoding of each model writes after it.

    `common_tokens` is how many first tokens the two continuations share.
    """

    text: str
    prompt: str
    continuation: str
    baseline_continuation: str | None = None
    common_tokens: int | None = None


def openings(ids: Tokens, separator: Sequence[int], count: int) -> list[Tokens]:
    """Return `count` prompts of a text (tokens,).

    A prompt is the begin of a document. A text with too few documents gives prompts at equal distances.
    """
    size = min(PROMPT_TOKENS, len(ids))
    ends = np.flatnonzero(np.isin(ids, separator)).tolist()
    begins = [0, *(end + 1 for end in ends)]
    whole = [begin for begin, end in zip(begins, [*ends, len(ids)], strict=True) if end - begin >= size]
    if len(whole) < count:
        whole = [at * (len(ids) - size) // count for at in range(count)]
    return [ids[begin : begin + size] for begin in whole[:count]]


def check_samples(new_tokens: int, positions: int) -> None:
    """Refuse continuations that the models have too few positions for.

    Raises:
        UsageError: prompt and continuation are longer than `positions` tokens.
    """
    if PROMPT_TOKENS + 1 + new_tokens > positions:
        raise UsageError(
            f"A sample is {PROMPT_TOKENS + 1 + new_tokens} tokens, more than the {positions} that the model takes.",
            "Use fewer --sample-tokens.",
        )


@devices.enough_memory("Writing samples", "Lower --sample-tokens, or compute in a smaller --dtype or on --device cpu.")
def write_samples(pair: ModelPair, settings: EvaluationSettings, events: Events) -> list[Sample]:
    """Let each model continue the first openings of each text; empty where no samples are asked for."""
    count, tokenizer = settings.samples, pair.tokenizers[0]
    if not count:
        return []
    found = []
    encoder = TextEncoder(tokenizer)
    advance = counted("Samples", len(pair.texts) * count * len(pair.models), events)
    for name, text in pair.texts.items():
        for prompt in openings(text.ids, encoder.separator, count):
            shown = torch.tensor([*encoder.start, *prompt.tolist()])
            written = []
            for model in pair.models:
                written.append(greedy(model, shown, settings.sample_tokens, tokenizer.eos_token_id))
                advance(1)
            continuations = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
            found.append(
                Sample(
                    text=name,
                    prompt=tokenizer.decode(prompt),
                    continuation=continuations[0],
                    baseline_continuation=continuations[1] if len(written) > 1 else None,
                    common_tokens=_common(*written) if len(written) > 1 else None,
                )
            )
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


@torch.no_grad()
def greedy(model: Any, ids: torch.Tensor, new_tokens: int, end: int | None) -> list[int]:
    """Return the tokens that greedy decoding writes.

    - `model`: a decoder-only model of transformers.
    - `ids`: the prompt, int64 (tokens,).
    - `new_tokens`: most tokens to write.
    - `end`: the token after which nothing is written, or None.
    """
    written: list[int] = []
    shown, cache = ids[None].to(model.device), None
    while len(written) < new_tokens:
        out = model(input_ids=shown, **with_cache(model, cache), use_cache=True, logits_to_keep=1)
        shown, cache = out.logits[:, -1:].argmax(-1), cache_of(out)
        written.append(int(shown))
        if written[-1] == end:
            break
    return written
