"""Text that the teacher writes: sampled in batches, each from its own seed, into a folder that TokenFile opens."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from uptrain.block_reader import Tokens
from uptrain.checkpoint.checksum import Checksum
from uptrain.checkpoint.jsonfile import dump_json, read_json
from uptrain.checkpoint.writer import write_atomic
from uptrain.content_digest import content_digest, tokenizer_digest
from uptrain.documents import pieces
from uptrain.errors import UptrainError, UsageError
from uptrain.recipe_schema import Teacher
from uptrain.token_file import TokenCount, TokenFile
from uptrain.token_text import encode, renderer_for, separator_of

_VERSION = 1
"""To be raised when the same teacher and options give other text."""


def generate_tokens(
    model: Any, tokenizer: Any, source: Teacher, block_size: int, seed: int, folder: Path,
    on_tokens: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Sample `source.tokens` tokens from `model` into `folder`, documents of at most `block_size` tokens.

    What an earlier call of the same model and options left there is kept: whole batches are not sampled again, and
    the tokens are the same as without the interruption. `on_tokens` is told how many more tokens there are.

    Raises:
        UsageError: no token to start from, no prompt that is long enough, or prompts as long as a block.
        UptrainError: the teacher writes nothing, or the disk is full.
    """
    key = teacher_digest(model, tokenizer, source, block_size, seed)
    if TokenFile.is_whole(folder) and read_json(folder / "tokens.json").get("key") == key:
        return
    with _friendly_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokens.json").unlink(missing_ok=True)
        _write(_Sampler(model, tokenizer, source, block_size, seed), folder, key, on_tokens or (lambda count: None))


def teacher_digest(model: Any, tokenizer: Any, source: Teacher, block_size: int, seed: int) -> str:
    """Return a hex digest of all that the teacher's text depends on: its weights, the prompts' content and options.

    Raises:
        UsageError: the prompts can't be found.
    """
    checksum = Checksum()
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in _NOT_THE_MODEL}
    prompts = None if source.prompts is None else content_digest([source.prompts], tokenizer)
    options = source.model_dump(exclude={"weight", "prompts"})
    stops = sorted(_stops(model, tokenizer))
    parts = [_VERSION, config, options, prompts, tokenizer_digest(tokenizer), stops, block_size, seed]
    checksum.update(json.dumps(parts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        checksum.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        checksum.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return checksum.text().partition(":")[2]


_NOT_THE_MODEL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}


@dataclass(frozen=True)
class _Progress:
    key: str
    batches: int = 0
    tokens: int = 0
    documents: int = 0
    bytes: int = 0


def _write(sampler: _Sampler, folder: Path, key: str, on_tokens: Callable[[int], None]) -> None:
    wanted = sampler.source.tokens
    dtype = np.dtype("uint16" if len(sampler.tokenizer) <= 2**16 else "uint32")
    note, tokens = folder / "progress.json", folder / "tokens.bin"
    done = _Progress(**read_json(note)) if note.is_file() else _Progress(key)
    if done.key != key or not tokens.is_file() or tokens.stat().st_size < done.tokens * dtype.itemsize:
        done = _Progress(key)
    prompts = sampler.prompts(done.batches)
    with tokens.open("ab") as file:
        # Behind the last noted batch lies what a killed process wrote without noting it.
        file.truncate(done.tokens * dtype.itemsize)
        if done.tokens:
            on_tokens(done.tokens)
        while done.tokens < wanted:
            earlier = done
            for text in sampler.sample(done.batches, next(prompts)):
                lead = sampler.separator if done.tokens else []
                row = (lead + text)[: wanted - done.tokens]
                kept = row[len(lead) :]
                file.write(np.array(row, dtype=dtype).data)
                size = len(sampler.tokenizer.decode(kept).encode())
                done = replace(done, tokens=done.tokens + len(row), documents=done.documents + bool(kept),
                               bytes=done.bytes + size)  # fmt: skip
            if done.tokens == earlier.tokens:
                raise UptrainError("The teacher ends every text before its first token.", "Give it prompts.")
            done = replace(done, batches=done.batches + 1)
            file.flush()
            os.fsync(file.fileno())
            write_atomic(note, dump_json(asdict(done)))
            on_tokens(done.tokens - earlier.tokens)
    count = TokenCount(done.tokens, done.documents, done.bytes, TokenFile.digest_of(tokens, dtype))
    write_atomic(folder / "tokens.json", dump_json({"key": key, "dtype": dtype.name, "count": asdict(count)}))


class _Sampler:
    def __init__(self, model: Any, tokenizer: Any, source: Teacher, block_size: int, seed: int) -> None:
        self.model, self.tokenizer, self.source, self.seed = model, tokenizer, source, seed
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
        self.stops = _stops(model, tokenizer)
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


def _stops(model: Any, tokenizer: Any) -> set[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    several = own if isinstance(own, list) else [own]
    return {int(token) for token in (*several, *separator_of(tokenizer)) if token is not None}


@contextmanager
def _sampling(model: Any, entropy: list[int]) -> Iterator[None]:
    devices = [model.device] if model.device.type == "cuda" else []
    training, defaults = model.training, model.generation_config
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(state[0]))
        model.eval()
        # What a call leaves unset, transformers takes from here.
        model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            model.generation_config = defaults
            model.train(training)


@contextmanager
def _friendly_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR):
            raise
        raise UptrainError(
            f"The teacher's text can't be written to {folder}: {error.strerror}.",
            "Make room there; the same command goes on after the last whole batch.",
        ) from None
