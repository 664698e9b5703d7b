"""Rows about the cache that `inspect` and `convert` both print."""

from __future__ import annotations


def cross_attention(caches: str) -> tuple[str, str]:
    """Return the row of a decoder that reads an encoder; `caches` is the size, or both with an arrow between."""
    return ("cross-attention", f"{caches} of that, for each token that the encoder read; the rest for each token of "
            "the decoder's")  # fmt: skip


def expanded_in_transformers(class_name: str) -> tuple[str, str]:
    """Return the row of a class that repeats the key/value heads before it caches them."""
    return ("in transformers", f"{class_name} caches a copy for every query head; memory is saved by engines that "
            "cache the heads themselves")  # fmt: skip
