"""Text that the teacher writes, sampled in batches into a folder that TokenFile reads."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from uptrain.checkpoint.checksum import Checksum
from uptrain.checkpoint.files import write_atomic
from uptrain.checkpoint.jsonfile import dump_json, read_json
from uptrain.data.content_digest import content_digest
from uptrain.data.token_file import TokenCount, TokenFile
from uptrain.errors import UptrainError
from uptrain.training.teacher_sampler import Sampler

_VERSION = 1
"""Raise this number when a change of code gives other text for the same teacher and options."""


def generate_tokens(sampler: Sampler, folder: Path, on_tokens: Callable[[int], None] = lambda count: None) -> None:
    """Sample a source's `tokens` tokens into `folder`, in documents of at most the block size.

    Whole batches that an interrupted call of an equal sampler left in `folder` are not sampled again. The tokens are
    those of an uninterrupted call.

    - `sampler`: the teacher with the source's options.
    - `folder`: receives the files that TokenFile reads.
    - `on_tokens`: receives the number of new tokens after each batch.

    Raises:
        UsageError: no prompt is long enough.
        UptrainError: the teacher writes nothing, or the disk is full.
    """
    key = teacher_digest(sampler)
    if TokenFile.is_whole(folder) and read_json(folder / "tokens.json").get("key") == key:
        return
    with _friendly_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokens.json").unlink(missing_ok=True)
        _write(sampler, folder, key, on_tokens)


def teacher_digest(sampler: Sampler) -> str:
    """Return a hex digest of all that the teacher's text depends on: its weights, the prompts' content and options.

    Raises:
        UsageError: the prompts can't be found.
    """
    model, encoder, source = sampler.model, sampler.encoder, sampler.source
    checksum = Checksum()
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in _NOT_THE_MODEL}
    prompts = None if source.prompts is None else content_digest([source.prompts], encoder)
    options = source.model_dump(exclude={"weight", "prompts"})
    parts = [
        _VERSION,
        config,
        options,
        prompts,
        encoder.digest,
        sorted(sampler.stops),
        sampler.block_size,
        sampler.seed,
    ]
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


def _write(sampler: Sampler, folder: Path, key: str, on_tokens: Callable[[int], None]) -> None:
    wanted = sampler.source.tokens
    dtype = np.dtype(sampler.encoder.dtype(sampler.model.config.vocab_size))
    record, tokens = folder / "progress.json", folder / "tokens.bin"
    done = _Progress(**read_json(record)) if record.is_file() else _Progress(key)
    if done.key != key or not tokens.is_file() or tokens.stat().st_size < done.tokens * dtype.itemsize:
        done = _Progress(key)
    prompts = sampler.prompts(done.batches)
    with tokens.open("ab") as file:
        # A killed process may have written tokens after the last batch that progress.json records.
        file.truncate(done.tokens * dtype.itemsize)
        if done.tokens:
            on_tokens(done.tokens)
        while done.tokens < wanted:
            earlier = done
            for text in sampler.sample(done.batches, next(prompts)):
                lead = sampler.encoder.separator if done.tokens else []
                row = (lead + text)[: wanted - done.tokens]
                written = row[len(lead) :]
                file.write(np.array(row, dtype=dtype).data)
                size = len(sampler.encoder.tokenizer.decode(written).encode())
                done = replace(done, tokens=done.tokens + len(row), documents=done.documents + bool(written),
                               bytes=done.bytes + size)  # fmt: skip
            if done.tokens == earlier.tokens:
                raise UptrainError("The teacher ends every text before its first token.", "Set prompts.")
            done = replace(done, batches=done.batches + 1)
            file.flush()
            os.fsync(file.fileno())
            write_atomic(record, dump_json(asdict(done)))
            on_tokens(done.tokens - earlier.tokens)
    count = TokenCount(done.tokens, done.documents, done.bytes, TokenFile.digest_of(tokens, dtype))
    write_atomic(folder / "tokens.json", dump_json({"key": key, "dtype": dtype.name, "count": asdict(count)}))


@contextmanager
def _friendly_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR):
            raise
        raise UptrainError(
            f"The teacher's text can't be written to {folder}: {error.strerror}.",
            "Make room there; the same command resumes after the last complete batch.",
        ) from None
