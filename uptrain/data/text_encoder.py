"""A tokenizer as reading text needs it: asked once for its separator, its size and its digest, then handed on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from uptrain.checkpoint.checksum import Checksum, checksum_file
from uptrain.data.chat import Render, renderer
from uptrain.data.sources import TextSource, has_chats
from uptrain.errors import CheckpointError, reported_as

_CALL_STATE = ("truncation", "padding")


class TextEncoder:
    """Turns text into tokens with a tokenizer of transformers, and knows what depends on the tokenizer alone."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def separator(self) -> list[int]:
        """Return the token between two documents as a list: end of text, else beginning of text, else no token."""
        for token in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            if token is not None:
                return [int(token)]
        return []

    @cached_property
    def start(self) -> list[int]:
        """Return the tokens that the tokenizer puts before any text: beginning of text, or none."""
        begin = self.tokenizer("")["input_ids"][:1]
        return list(begin) if begin == [self.tokenizer.bos_token_id] else []

    @cached_property
    def largest(self) -> int:
        """Return the largest token."""
        return int(max(self.tokenizer.get_vocab().values(), default=0))

    @cached_property
    def digest(self) -> str:
        """Return a digest of how the tokenizer turns text into tokens, without its chat template."""
        tokenizer = self.tokenizer
        content: list[Any] = [type(tokenizer).__name__, len(tokenizer), self.separator]
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # Calls change these two settings, and tokenising a corpus uses neither.
            settings = json.loads(backend.to_str())
            content.append({key: value for key, value in settings.items() if key not in _CALL_STATE})
        else:
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save_pretrained(folder)
                files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
                content.append([[path.name, checksum_file(path)] for path in files])
        checksum = Checksum()
        checksum.update(json.dumps(content).encode())
        return checksum.text()

    def dtype(self, vocab_size: int = 0) -> str:
        """Return the smallest dtype that holds every token of the tokenizer and of a model with `vocab_size` tokens."""
        return "uint16" if max(self.largest, vocab_size - 1) < 2**16 else "uint32"

    def tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise texts without adding special tokens.

        Raises:
            CheckpointError: the tokenizer fails on the text.
        """
        with reported_as(_unfit):
            out = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(out["input_ids"])

    def renderer_for(self, sources: Sequence[TextSource]) -> Render | None:
        """Return the function that writes the sources' conversations, or None where no source has conversations.

        Raises:
            UsageError: a source has conversations, and the tokenizer has no chat template.
        """
        return renderer(self.tokenizer) if any(has_chats(source) for source in sources) else None


def _unfit(reason: str) -> CheckpointError:
    return CheckpointError(f"The tokenizer fails on this text: {reason}", "Download it again, or use another one.")
