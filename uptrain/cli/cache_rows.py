"""Rows about the cache that `inspect` and `convert` both print."""

from __future__ import annotations


def cross_attention(caches: str) -> tuple[str, str]:
    """Return the row of a decoder that reads an encoder; `caches` is the size, or the sizes before and after."""
    return ("cross-attention", f"{caches} of it per token of the encoder; the rest per token of the decoder")


def expanded_in_transformers(class_name: str) -> tuple[str, str]:
    """Return the row of a class that repeats the key/value heads before it caches them."""
    return ("in transformers", f"{class_name} caches a copy per query head. Engines that cache key/value heads save "
            "the memory")  # fmt: skip
