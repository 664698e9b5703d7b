"""Load a checkpoint for generating, with absorbed decoding where its class lacks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uptrain.checkpoint.source import resolve
from uptrain.hosts.loaded import load_language_model


def load(
    model: str | Path,
    *,
    absorbed: bool = True,
    revision: str | None = None,
    allow_pickle: bool = False,
    **options: Any,
) -> Any:
    """Load a language model from a folder, a Hub id or `demo`, ready to generate.

    Our own classes need no remote code here. Stock MLA classes cache a latent but expand all of it at every step;
    with `absorbed` their layers attend over the latent itself instead, with the same logits up to rounding.
    `allow_pickle` permits to read `.bin` weights, with torch's restricted unpickler. `options` go to transformers'
    `from_pretrained` (dtype, device_map, attn_implementation, …).

    Raises:
        UptrainError: there is no such checkpoint, transformers can't load it, its dtype can't hold it, it has no
            language-model head, or weights are missing.
    """
    from uptrain.hosts import latent_norm

    source = resolve(str(model), revision, allow_pickle)
    found = load_language_model(source, **options)
    latent_norm.check_loaded(found)
    if absorbed:
        from uptrain.hosts.absorbed import absorb

        absorb(found)
    return found.eval()
