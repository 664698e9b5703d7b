"""A recipe's `data` as a reader of token blocks: one file of tokens, one stream, or a mixture of several."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uptrain.checkpoint.files import write_atomic
from uptrain.data.block_reader import BlockReader
from uptrain.data.content_digest import content_digest
from uptrain.data.mixture import Mixture
from uptrain.data.sources import Dataset, TeacherText, TextSource, is_stream
from uptrain.data.text_encoder import TextEncoder
from uptrain.data.token_cache import tokens_folder
from uptrain.data.token_file import TokenFile
from uptrain.data.token_stream import TokenStream
from uptrain.errors import UsageError


def _parts(sources: Sequence[TextSource]) -> list[list[TextSource]]:
    """Return the sources by reader: one reader per source where they have weights, else one reader for all."""
    return [list(sources)] if sources[0].weight is None else [[source] for source in sources]


def build_tokens(
    sources: Sequence[TextSource], encoder: TextEncoder, folder: Path, first: bool = True,
    generate: Callable[[TeacherText, Path], None] | None = None,
) -> list[Path | None]:  # fmt: skip
    """Tokenise a recipe's `data`, unless the cache has the tokens already.

    - `sources`: the recipe's data.
    - `encoder`: turns text into tokens.
    - `folder`: the run's own folder for the digests, the teacher's text and what the cache can't hold.
    - `first`: whether this is the first process of the run. Only that one computes digests, which reads all text.
    - `generate`: writes the teacher's text for a source into a folder; None for a run without a teacher.

    Returns one folder of tokens per reader, None for a stream.

    Raises:
        UsageError: a source can't be read, or there is no teacher to write one.
        UptrainError: no folder can be written.
    """
    parts = _parts(sources)
    known = folder / "digests.json"
    if first:
        made = [None if is_stream(part[0]) or isinstance(part[0], TeacherText) else content_digest(part, encoder)
                for part in parts]  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(known, json.dumps(made))
    found: list[Path | None] = []
    for index, (part, digest) in enumerate(zip(parts, json.loads(known.read_text()), strict=True)):
        source = part[0]
        if isinstance(source, TeacherText):
            if generate is None:
                raise UsageError("data has text from the teacher, but the run has no teacher.", "Give it one.")
            found.append(folder / f"teacher-{index}")
            generate(source, folder / f"teacher-{index}")
        else:
            found.append(None if digest is None else tokens_folder(digest, part, encoder, folder))
    return found


def counts_of(reader: BlockReader) -> list[dict[str, Any]]:
    """Return what was tokenised for a reader, one entry per source, for the manifest."""
    parts = reader.readers if isinstance(reader, Mixture) else [reader]
    return [asdict(part.count) if isinstance(part, TokenFile) else {"stream": True} for part in parts]


def open_reader(
    sources: Sequence[TextSource], encoder: TextEncoder, folders: Sequence[Path | None], block_size: int, seed: int
) -> BlockReader:
    """Return the reader of a recipe's `data`.

    - `sources`: the recipe's data.
    - `encoder`: tokenises streams while they are read.
    - `folders`: what `build_tokens` returned.
    - `block_size`: tokens per block.
    - `seed`: determines the order of the blocks.

    Raises:
        UsageError: a source has less than one block of text.
    """
    readers: list[BlockReader] = []
    for part, folder in zip(_parts(sources), folders, strict=True):
        if folder is None:
            stream = part[0]
            assert isinstance(stream, Dataset)
            readers.append(TokenStream(stream, encoder, block_size))
        else:
            readers.append(TokenFile(folder, block_size, seed))
    return readers[0] if len(readers) == 1 else Mixture(readers, [source.weight or 0 for source in sources], seed)
