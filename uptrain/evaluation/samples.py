"""What models write after the same words, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from uptrain.data.block_reader import Tokens
from uptrain.data.token_text import separator_of, start_ids
from uptrain.errors import UsageError
from uptrain.evaluation.progress import Progress, counted
from uptrain.evaluation.reading import cache_of, with_cache
from uptrain.models import devices

PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Sample:
    """A prompt and what greedy decoding of each model writes after it; they share their first `common_tokens`."""

    text: str
    prompt: str
    continuation: str
    baseline_continuation: str | None = None
    common_tokens: int | None = None


def openings(ids: Tokens, separator: Sequence[int], count: int) -> list[Tokens]:
    """Return `count` prompts of a text (tokens,): how its first documents begin, else places evenly through it."""
    size = min(PROMPT_TOKENS, len(ids))
    ends = np.flatnonzero(np.isin(ids, separator)).tolist()
    begins = [0, *(end + 1 for end in ends)]
    whole = [begin for begin, end in zip(begins, [*ends, len(ids)], strict=True) if end - begin >= size]
    if len(whole) < count:
        whole = [at * (len(ids) - size) // count for at in range(count)]
    return [ids[begin : begin + size] for begin in whole[:count]]


def check_samples(new_tokens: int, longest: int) -> None:
    """Refuse what the models have no positions for.

    Raises:
        UsageError: prompt and continuation are longer than `longest` tokens.
    """
    if PROMPT_TOKENS + 1 + new_tokens > longest:
        raise UsageError(
            f"{new_tokens} tokens after a prompt of {PROMPT_TOKENS} are more than the {longest} that the model takes.",
            "Use fewer --sample-tokens.",
        )


@devices.enough_memory("Writing samples", "Lower --sample-tokens, or compute in a smaller --dtype or on --device cpu.")
def write_samples(
    loaded: Sequence[Any], tokenizer: Any, texts: dict[str, Tokens], count: int, new_tokens: int,
    on_progress: Progress | None = None,
) -> list[Sample]:  # fmt: skip
    """Let one or two models write at most `new_tokens` after `count` openings of each text."""
    found = []
    begin = start_ids(tokenizer)
    advance = counted("Samples", len(texts) * count * len(loaded), on_progress)
    for name, ids in texts.items():
        for prompt in openings(ids, separator_of(tokenizer), count):
            shown = torch.tensor([*begin, *prompt.tolist()])
            written = []
            for model in loaded:
                written.append(greedy(model, shown, new_tokens, tokenizer.eos_token_id))
                advance(1)
            spelt = [tokenizer.decode(one, skip_special_tokens=True) for one in written]
            each = Sample(name, tokenizer.decode(prompt), spelt[0])
            if len(written) > 1:
                each = replace(each, baseline_continuation=spelt[1], common_tokens=_common(*written))
            found.append(each)
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


@torch.no_grad()
def greedy(model: Any, ids: torch.Tensor, new_tokens: int, end: int | None) -> list[int]:
    """Return the likeliest next tokens after `ids` (tokens,), up to `new_tokens` or the end of text."""
    written: list[int] = []
    shown, cache = ids[None].to(model.device), None
    while len(written) < new_tokens:
        out = model(input_ids=shown, **with_cache(model, cache), use_cache=True, logits_to_keep=1)
        shown, cache = out.logits[:, -1:].argmax(-1), cache_of(out)
        written.append(int(shown))
        if written[-1] == end:
            break
    return written
