"""Small texts, tokenizers and checkpoints for the tests of training and evaluation."""

from __future__ import annotations

import copy
import functools
import random
from pathlib import Path
from typing import Any

import torch

from tests.conftest import save_model, tiny_config
from uptrain.training.recipe import TokenizerSpec
from uptrain.training.tokenizer import new_tokenizer

WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "brew",
    "strange", "tea", "in", "quiet", "rooms",
]  # fmt: skip


def sentences(count: int, seed: int = 0) -> str:
    """Return lines of words in which each word narrows down the next, so that there is something to learn."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        at = draw.randrange(len(WORDS))
        words = [WORDS[(at + step * draw.choice((1, 1, 1, 2))) % len(WORDS)] for step in range(8)]
        lines.append(" ".join(words) + ".\n")
    return "".join(lines)


def tokenizer(vocab_size: int = 300) -> Any:
    """Return a byte-level BPE tokenizer trained on the words above, a copy of its own."""
    return copy.deepcopy(_tokenizer(vocab_size))


@functools.cache
def _tokenizer(vocab_size: int) -> Any:
    return new_tokenizer(TokenizerSpec(vocab_size=vocab_size), iter([sentences(50)]))


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def checkpoint(folder: Path, model_type: str = "gpt2", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a tiny checkpoint with its tokenizer."""
    words = tokenizer()
    special = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = tiny_config(model_type, **{"initializer_range": 0.05, **special, **changes})
    save_model(folder, config, dtype=dtype)
    words.save_pretrained(folder)
    return folder


def corpus(path: Path, lines: int = 400, seed: int = 0) -> Path:
    """Write a text file."""
    path.write_text(sentences(lines, seed), encoding="utf-8")
    return path
