"""Batches of text sampled from a model, from nothing or from the beginnings of documents."""

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
from uptrain.data.token_text import encode, renderer_for, separator_of
from uptrain.errors import UsageError
from uptrain.models import devices


class Sampler:
    """The teacher with a source's options: what it writes in a batch depends on the seed and the batch's index."""

    def __init__(self, model: Any, tokenizer: Any, source: TeacherText, block_size: int, seed: int) -> None:
        self.model, self.tokenizer, self.source = model, tokenizer, source
        self.block_size, self.seed = block_size, seed
        self.separator = separator_of(tokenizer)
        self.start = self._start()
        length = len(self.start) + (source.prompt_tokens if source.prompts is not None else 0)
        if not self.start and source.prompts is None:
            raise UsageError("The tokenizer has no token that begins or ends a text to start from.", "Give prompts.")
        if length >= block_size:
            raise UsageError(
                f"prompt_tokens {source.prompt_tokens} leave nothing to write in a block of {block_size}.",
                "Give fewer prompt_tokens or a larger block_size.",
            )
        self.stops = stops_of(model, tokenizer)
        # Plain sampling: what the checkpoint's own settings cut off would be missing in the student for good.
        self.config = GenerationConfig(
            do_sample=True, temperature=source.temperature, top_k=0, top_p=1.0, max_new_tokens=block_size - length,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(self.stops) or None,
            pad_token_id=min(self.stops, default=0),
        )  # fmt: skip

    def _start(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        if self.source.prompts is None:
            return [int(bos)] if bos is not None else self.separator
        leads = self.tokenizer("a")["input_ids"][:1] == [bos]
        return [int(bos)] if leads and bos is not None else []

    def prompts(self, batches: int) -> Iterator[Tokens]:
        """Yield each batch's beginnings, (batch, tokens) int64, after those of the first `batches`."""
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
        render = renderer_for(sources, self.tokenizer)
        while True:
            found = False
            for piece in pieces(sources, render):
                if not piece.first:
                    continue
                # A token is rarely more than 16 characters, and only the first ones of a long document are needed.
                ids = encode(self.tokenizer, [piece.text[: 16 * wanted]])[0]
                if len(ids) >= wanted:
                    found = True
                    yield ids[:wanted]
            if not found:
                raise UsageError(
                    f"No document of prompts has {wanted} tokens.", "Give other prompts, or fewer prompt_tokens."
                )

    def sample(self, batch: int, begin: Tokens) -> list[list[int]]:
        """Return the texts of a batch that hold anything, without the tokens that begin and end them."""
        ids = torch.from_numpy(begin).to(self.model.device)
        with _sampling(self.model, [self.seed, batch]):
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=self.config
            ).tolist()
        texts = []
        for row in out:
            written = row[begin.shape[1] :]
            end = next((place for place, token in enumerate(written) if token in self.stops), len(written))
            # Another stop than the separator, such as the end of a turn, belongs to the text.
            extra = [token for token in written[end : end + 1] if token not in self.separator]
            texts.append(row[len(self.start) : begin.shape[1]] + written[:end] + extra)
        return [text for text in texts if text]


def stops_of(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text."""
    own = getattr(model.generation_config, "eos_token_id", None)
    several = own if isinstance(own, list) else [own]
    return {int(token) for token in (*several, *separator_of(tokenizer)) if token is not None}


@contextmanager
def _sampling(model: Any, entropy: list[int]) -> Iterator[None]:
    training, defaults = model.training, model.generation_config
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    with devices.seeded(int(state[0]), model.device):
        model.eval()
        # What a call leaves unset, transformers takes from here.
        model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            model.generation_config = defaults
            model.train(training)
