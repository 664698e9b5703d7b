"""Sampling text from the teacher in batches, with or without the beginnings of documents as prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from uptrain.data.block_reader import Tokens
from uptrain.data.documents import pieces
from uptrain.data.sources import TeacherText
from uptrain.data.text_encoder import TextEncoder
from uptrain.errors import UsageError
from uptrain.models import devices


class Sampler:
    """A teacher with the options of a text source. The text of a batch depends only on the seed and the batch's index.

    - `model`: the teacher.
    - `encoder`: its tokenizer.
    - `source`: the options from the recipe.
    - `block_size`: the largest number of tokens per document.
    - `seed`: the recipe's seed.

    Raises:
        UsageError: the tokenizer has no token to start from and there are no prompts, or prompts fill a block.
    """

    def __init__(self, model: Any, encoder: TextEncoder, source: TeacherText, block_size: int, seed: int) -> None:
        self.model, self.encoder, self.source = model, encoder, source
        self.block_size, self.seed = block_size, seed
        self.start = self._start()
        length = len(self.start) + (source.prompt_tokens if source.prompts is not None else 0)
        if not self.start and source.prompts is None:
            raise UsageError(
                "The tokenizer has no token that begins or ends a text, so a text can't start.", "Set prompts."
            )
        if length >= block_size:
            raise UsageError(
                f"prompt_tokens {source.prompt_tokens} leave nothing to write in a block of {block_size}.",
                "Set fewer prompt_tokens or a larger block_size.",
            )
        self.stops = stops_of(model, encoder)
        # Plain sampling: tokens that the checkpoint's top_k or top_p exclude would be unknown to the student.
        self.config = GenerationConfig(
            do_sample=True, temperature=source.temperature, top_k=0, top_p=1.0, max_new_tokens=block_size - length,
            bos_token_id=encoder.tokenizer.bos_token_id, eos_token_id=sorted(self.stops) or None,
            pad_token_id=min(self.stops, default=0),
        )  # fmt: skip

    def _start(self) -> list[int]:
        bos = self.encoder.tokenizer.bos_token_id
        if self.source.prompts is None:
            return [int(bos)] if bos is not None else self.encoder.separator
        leads = self.encoder.tokenizer("a")["input_ids"][:1] == [bos]
        return [int(bos)] if leads and bos is not None else []

    def prompts(self, batches: int) -> Iterator[Tokens]:
        """Yield the prompts of each batch, (batch, tokens) int64, without those of the first `batches` batches."""
        size = self.source.batch_size
        if self.source.prompts is None:
            while True:
                yield np.tile(np.array(self.start, dtype=np.int64), (size, 1))
        found = islice(self._beginnings(), batches * size, None)
        while True:
            yield np.array([self.start + next(found) for _ in range(size)], dtype=np.int64)

    def _beginnings(self) -> Iterator[list[int]]:
        assert self.source.prompts is not None
        wanted = self.source.prompt_tokens
        sources = [self.source.prompts]
        render = self.encoder.renderer_for(sources)
        while True:
            found = False
            for piece in pieces(sources, render):
                if not piece.first:
                    continue
                # Few tokens have more than 16 characters, so this is enough of a long document.
                ids = self.encoder.tokens_of([piece.text[: 16 * wanted]])[0]
                if len(ids) >= wanted:
                    found = True
                    yield ids[:wanted]
            if not found:
                raise UsageError(
                    f"No document of prompts has {wanted} tokens.", "Set other prompts or fewer prompt_tokens."
                )

    def sample(self, batch: int, begin: Tokens) -> list[list[int]]:
        """Return the texts of a batch that are not empty, without the tokens that begin and end them.

        - `batch`: the batch's index.
        - `begin`: its prompts, (batch, tokens) int64.
        """
        ids = torch.from_numpy(begin).to(self.model.device)
        with _sampling(self.model, [self.seed, batch]):
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=self.config
            ).tolist()
        texts = []
        for row in out:
            written = row[begin.shape[1] :]
            end = next((place for place, token in enumerate(written) if token in self.stops), len(written))
            # A stop token that is not the separator, such as the end of a chat message, belongs to the text.
            extra = [token for token in written[end : end + 1] if token not in self.encoder.separator]
            texts.append(row[len(self.start) : begin.shape[1]] + written[:end] + extra)
        return [text for text in texts if text]


def stops_of(model: Any, encoder: TextEncoder) -> set[int]:
    """Return the tokens that end a text, by the model's settings and the tokenizer."""
    own = getattr(model.generation_config, "eos_token_id", None)
    several = own if isinstance(own, list) else [own]
    return {int(token) for token in (*several, *encoder.separator) if token is not None}


@contextmanager
def _sampling(model: Any, entropy: list[int]) -> Iterator[None]:
    training, defaults = model.training, model.generation_config
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    with devices.seeded(int(state[0]), model.device):
        model.eval()
        # transformers takes from here what a call does not set.
        model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            model.generation_config = defaults
            model.train(training)
