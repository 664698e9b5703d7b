"""Load a checkpoint for generating, with absorbed decoding where its class lacks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uptrain.checkpoint.source import resolve
from uptrain.hosts.checked_loading import load_checked


def load(model: str | Path, *, absorbed: bool = True, revision: str | None = None, **options: Any) -> Any:
    """Load a language model from a folder, a Hub id or `demo`, ready to generate.

    Our own classes need no remote code here. Stock MLA classes cache a latent but expand all of it at every step;
    with `absorbed` their layers attend over the latent itself instead, with the same logits up to rounding. `options`
    go to transformers' `from_pretrained` (dtype, device_map, attn_implementation, …).

    Raises:
        UptrainError: there is no such checkpoint, transformers can't load it, or its dtype can't hold it.
    """
    from uptrain.hosts import latent_norm

    source = resolve(str(model), revision)
    settings = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False, **options}
    found = load_checked(source.path, source.name, **settings)
    latent_norm.check_loaded(found)
    if absorbed:
        from uptrain.hosts.absorbed import absorb

        absorb(found)
    return found.eval()
