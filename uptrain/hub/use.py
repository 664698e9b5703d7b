"""How a published checkpoint is loaded and served: what its class needs, and which engines know it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uptrain.checkpoint.sidecars import READERS
from uptrain.hub.history import Stage
from uptrain.layout import Architecture
from uptrain.model_config import auto_class_name

TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
}
"""The Hub's name of what each of transformers' Auto classes does."""

_READS_TEXT = ("tokenizer", "AutoTokenizer", 'tokenizer("The", return_tensors="pt")')
_READS_SOUND = (
    "processor", "AutoProcessor", 'processor(samples, sampling_rate=16_000, return_tensors="pt")  # samples: float32',
)  # fmt: skip


def use(repo: str, config: Mapping[str, Any], converted: Sequence[Stage], revision: str | None) -> str:
    """Return the card's section on loading and serving `repo`."""
    code = _model_code(config)
    remote = bool(code)
    last = converted[-1] if converted else {}
    auto = auto_class_name(config)
    served = "It runs in transformers only." if _alone(auto, remote, last) else _serving(repo, remote, last, revision)
    return "\n\n".join((_loading(repo, auto, config, revision), _code(config, code), served))


def _alone(auto: str, remote: bool, last: Mapping[str, Any]) -> bool:
    # vLLM and llama.cpp have no class for such decoders and latents, and no such rotary table.
    latent = last.get("latent")
    return auto != Architecture.auto_class or bool(latent and (remote or latent.get("rope") == "longrope"))


def _model_code(config: Mapping[str, Any]) -> dict[str, Any]:
    return {auto: name for auto, name in (config.get("auto_map") or {}).items() if auto not in READERS}


def _loading(repo: str, auto: str, config: Mapping[str, Any], revision: str | None) -> str:
    at = f', revision="{revision}"' if revision else ""
    trust = ", trust_remote_code=True" if _model_code(config) else ""
    name, reader, given = _READS_SOUND if TASKS[auto] == "automatic-speech-recognition" else _READS_TEXT
    trust_reader = ", trust_remote_code=True" if reader in (config.get("auto_map") or {}) else ""
    return f'''```python
from transformers import {", ".join(sorted((auto, reader)))}

{name} = {reader}.from_pretrained("{repo}"{at}{trust_reader})
model = {auto}.from_pretrained("{repo}"{at}, dtype="auto"{trust})
inputs = {given}
print({name}.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```'''


def _code(config: Mapping[str, Any], code: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else config.get("model_type")
    if not code and config.get("auto_map"):
        return f"`{name}` is a class of transformers. The tokenizer or processor runs code of this repository."
    if not code:
        return f"No remote code: `{name}` is a class of transformers."
    file = str(next(iter(code.values()))).rpartition(".")[0] + ".py"
    return (
        f"Its class, `{name}`, is not one of transformers: `trust_remote_code=True` runs `{file}` of this repository. "
        "After `import uptrain` it loads without."
    )


def _serving(repo: str, remote: bool, last: Mapping[str, Any], revision: str | None) -> str:
    at = f" --revision {revision}" if revision else ""
    latent = last.get("latent")
    served = f"```bash\nvllm serve {repo}{at}{' --trust-remote-code' if remote else ''}\n```"
    if latent:
        served += (
            "\n\ntransformers caches the latent, but expands all of it at every step; "
            f'`uptrain.load("{repo}")` decodes from the latent itself.'
        )
    return served
