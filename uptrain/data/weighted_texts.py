"""Several texts with weights in one option, read as blocks of tokens in the proportion of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uptrain.data.block_reader import Tokens
from uptrain.data.boundary import Boundary
from uptrain.data.documents import with_row_fields
from uptrain.data.sources import BUILTIN_TEXT, TextSource, text_of_option, weighted_names
from uptrain.data.text_encoder import TextEncoder
from uptrain.data.token_text import TokenText, read_tokens
from uptrain.errors import UsageError

LEAST = 2
"""Blocks of each text: one to fit on and one to check on."""


@dataclass(frozen=True)
class WeightedText:
    """A text as an option names it, its source, and its share of the tokens relative to the other texts."""

    name: str
    source: TextSource
    weight: float


@dataclass(frozen=True)
class ReadText:
    """What was read of one text: how many blocks it gave, and its tokens per byte of text."""

    text: WeightedText
    blocks: int
    tokens_per_byte: float


@dataclass(frozen=True)
class TextBlocks:
    """Blocks of several texts, in an order in which every stretch has about each text's share.

    - `ids`: (n, block_size) int64.
    - `text_of`: for each block, which of `texts` it is from.
    - `texts`: what was read, in the order of the option.
    - `short`: the texts that are shorter than their share, so that the others have more blocks.
    - `boundary`: the token between two documents of a text, None for a tokenizer without one.
    """

    ids: Tokens
    text_of: tuple[int, ...]
    texts: tuple[ReadText, ...]
    short: tuple[str, ...] = ()
    boundary: Boundary | None = None


def weighted_texts(option: str, value: str) -> tuple[WeightedText, ...]:
    """Return the texts that an option names as TEXT[:WEIGHT],…; conversations are found in the files' rows.

    Raises:
        UsageError: a name is not that of a text, a file does not exist, or a weight is not positive.
    """
    found = []
    for name, weight in weighted_names(option, value).items():
        source = text_of_option(option, BUILTIN_TEXT if name == "builtin" else name)
        found.append(WeightedText(name, with_row_fields(source), weight))
    return tuple(found)


def read_blocks(option: str, texts: Sequence[WeightedText], tokenizer: Any, tokens: int, block_size: int) -> TextBlocks:
    """Read at most `tokens` tokens as whole blocks, each of one text. Blocks are shared out by weight, to the block.

    Where a text is too short for its share, the others have what it lacks.

    - `option`: the option that names the texts, for errors.
    - `texts`: the texts.
    - `tokenizer`: a tokenizer of transformers.
    - `tokens`: the tokens of all texts together.
    - `block_size`: the tokens of a block.

    Raises:
        UsageError: a text is empty or binary, or gives less than two blocks.
    """
    count = tokens // block_size
    for text, blocks in zip(texts, allotted(count, [text.weight for text in texts]), strict=True):
        if blocks < LEAST:
            weighted = ", or raise its weight" if len(texts) > 1 else ""
            raise UsageError(
                f"{option} {text.name} has a share of {blocks} of {count} blocks of {block_size} tokens, and needs "
                f"{LEAST}.",
                f"Raise --calibration-tokens {tokens}, or lower --calibration-block{weighted}.",
            )
    read, short = _read_all(option, texts, tokenizer, (count, block_size))
    for index in short:
        if len(read[index].ids) < LEAST * block_size:
            raise UsageError(
                f"{option} {texts[index].name} has {len(read[index].ids)} tokens, less than two blocks of "
                f"{block_size}.",
                "Give more text, or lower --calibration-block.",
            )
    blocks_of = [part.ids[: len(part.ids) // block_size * block_size].reshape(-1, block_size) for part in read]
    order = list(_interleaved([len(blocks) for blocks in blocks_of]))
    taken = [iter(blocks) for blocks in blocks_of]
    found = tuple(
        ReadText(text, len(blocks), len(part.ids) / max(1, part.bytes))
        for text, part, blocks in zip(texts, read, blocks_of, strict=True)
    )
    names = tuple(texts[index].name for index in sorted(short)) if len(texts) > 1 else ()
    ids = np.stack([next(taken[index]) for index in order])
    return TextBlocks(ids, tuple(order), found, names, Boundary.of(TextEncoder(tokenizer)))


def _read_all(
    option: str, texts: Sequence[WeightedText], tokenizer: Any, size: tuple[int, int]
) -> tuple[list[TokenText], set[int]]:
    """Read each text's share of `size`, (blocks, tokens of a block); return also which are too short for theirs."""
    count, block_size = size
    read: dict[int, TokenText] = {}
    short: dict[int, int] = {}
    while True:
        rest = [index for index in range(len(texts)) if index not in short]
        room = count - sum(short.values())
        wanted = dict(zip(rest, allotted(room, [texts[index].weight for index in rest]), strict=True))
        for index in rest:
            if index not in read or len(read[index].ids) < wanted[index] * block_size:
                read[index] = _read(option, texts[index], tokenizer, wanted[index] * block_size)
        has = {index: len(read[index].ids) // block_size for index in rest}
        lacking = {index: blocks for index, blocks in has.items() if blocks < wanted[index]}
        if not lacking:
            return [read[index] for index in range(len(texts))], set(short)
        short |= lacking


def allotted(total: int, weights: Sequence[float]) -> list[int]:
    """Divide `total` by weights into whole numbers, by largest remainders; the earlier of two equal ones has more.

    Source: Hamilton's method; Balinski and Young 2001, Fair Representation, chapter 3.
    """
    if not weights:
        return []
    exact = [total * weight / sum(weights) for weight in weights]
    found = [int(value) for value in exact]
    by_rest = sorted(range(len(exact)), key=lambda index: found[index] - exact[index])
    for index in by_rest[: total - sum(found)]:
        found[index] += 1
    return found


def _interleaved(counts: Sequence[int]) -> Iterator[int]:
    """Yield each index as often as its count says, evenly spread."""
    places = [((step + 0.5) / count, index) for index, count in enumerate(counts) for step in range(count)]
    yield from (index for _, index in sorted(places))


def _read(option: str, text: WeightedText, tokenizer: Any, limit: int) -> TokenText:
    try:
        return read_tokens([text.source], tokenizer, limit)
    except UsageError as error:
        raise UsageError(f"{option} {text.name}: {error.message}", error.hint) from None
