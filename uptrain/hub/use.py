"""How a published checkpoint is loaded and served: what its class needs, and which engines know it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uptrain.hub.history import Stage


def use(repo: str, config: Mapping[str, Any], converted: Sequence[Stage], revision: str | None) -> str:
    """Return the card's section on loading and serving `repo`."""
    remote = bool(config.get("auto_map"))
    last = converted[-1] if converted else {}
    return "\n\n".join(
        filter(None, (_loading(repo, remote, revision), _code(config, remote), _serving(repo, remote, last, revision)))
    )


def _loading(repo: str, remote: bool, revision: str | None) -> str:
    at = f', revision="{revision}"' if revision else ""
    trust = ", trust_remote_code=True" if remote else ""
    return f'''```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}"{at})
model = AutoModelForCausalLM.from_pretrained("{repo}"{at}, dtype="auto"{trust})
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```'''


def _code(config: Mapping[str, Any], remote: bool) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else config.get("model_type")
    if not remote:
        return f"No remote code: `{name}` is a class of transformers."
    file = str(next(iter(config["auto_map"].values()))).rpartition(".")[0] + ".py"
    return (
        f"Its class, `{name}`, is not one of transformers: `trust_remote_code=True` runs `{file}` of this repository. "
        "After `import uptrain` it loads without."
    )


def _serving(repo: str, remote: bool, last: Mapping[str, Any], revision: str | None) -> str:
    at = f" --revision {revision}" if revision else ""
    latent = last.get("latent")
    if latent and (remote or latent.get("rope") == "longrope"):
        # vLLM and llama.cpp have no class for the first, and no such rotary table for the second.
        return "It runs in transformers only."
    served = f"```bash\nvllm serve {repo}{at}{' --trust-remote-code' if remote else ''}\n```"
    if latent:
        served += (
            "\n\ntransformers caches the latent, but expands all of it at every step; "
            f'`uptrain.load("{repo}")` decodes from the latent itself.'
        )
    return served
