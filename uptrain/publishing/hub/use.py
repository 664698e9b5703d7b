"""The card's section on loading and serving: what the class needs, and which engines support it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uptrain.architectures.description import auto_class_name
from uptrain.architectures.model_class import auto_class_without_head, is_language_model
from uptrain.architectures.wrappers import language_config
from uptrain.checkpoint.sidecars import READERS
from uptrain.models.engines import why_not_vllm
from uptrain.publishing.hub.history import Stage

TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModel": "feature-extraction",
}
"""The Hub's name of the task of each Auto class of transformers."""

_READS_TEXT = ("tokenizer", "AutoTokenizer", 'tokenizer("The", return_tensors="pt")')
_READS_SOUND = (
    "processor", "AutoProcessor", 'processor(samples, sampling_rate=16_000, return_tensors="pt")  # samples: float32',
)  # fmt: skip
_READS_BOTH = (
    "processor", "AutoProcessor", 'processor(text="The", return_tensors="pt")  # and images, as the base model says',
)  # fmt: skip
_READERS = {"automatic-speech-recognition": _READS_SOUND, "image-text-to-text": _READS_BOTH}


def auto_class_of(config: Mapping[str, Any]) -> str:
    """Return the name of the Auto class that loads a published checkpoint with its head."""
    return auto_class_name(config) if is_language_model(config) else auto_class_without_head(config)


def use(repo: str, config: Mapping[str, Any], converted: Sequence[Stage], revision: str | None) -> str:
    """Return the card's section on loading and serving.

    - `repo`: the repository.
    - `config`: its config.json.
    - `converted`: the conversions of its history.
    - `revision`: the branch; None for main.
    """
    code = _model_code(config)
    remote = bool(code)
    last = converted[-1] if converted else {}
    auto = auto_class_of(config)
    why = why_not_vllm(config, (last.get("latent") or {}).get("rope"))
    served = f"It runs in transformers only: {why}." if why else _serving(repo, remote, last, revision)
    return "\n\n".join((_loading(repo, auto, config, revision), _code(config, code), served))


def _model_code(config: Mapping[str, Any]) -> dict[str, Any]:
    return {auto: name for auto, name in (config.get("auto_map") or {}).items() if auto not in READERS}


def _loading(repo: str, auto: str, config: Mapping[str, Any], revision: str | None) -> str:
    at, remote = f', revision="{revision}"' if revision else "", bool(_model_code(config))
    trust = ", trust_remote_code=True" if remote else ""
    name, reader, given = _READERS.get(TASKS[auto], _READS_TEXT)
    # By default, transformers asks about the config's code even when it loads a tokenizer without code.
    asked = ", trust_remote_code=False" if remote else ""
    asked = ", trust_remote_code=True" if reader in (config.get("auto_map") or {}) else asked
    writes = is_language_model(config)
    shown = f"{name}.decode(model.generate(**inputs, max_new_tokens=20)[0])" if writes else "model(**inputs)[0]"
    return f'''```python
from transformers import {", ".join(sorted((auto, reader)))}

{name} = {reader}.from_pretrained("{repo}"{at}{asked})
model = {auto}.from_pretrained("{repo}"{at}, dtype="auto"{trust})
inputs = {given}
print({shown})
```'''


def _code(config: Mapping[str, Any], code: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else config.get("model_type")
    if not code and config.get("auto_map"):
        reads = "The tokenizer or processor runs code of this repository."
        return f"`{name}` is a class of transformers.{_versions(config)} {reads}"
    if not code:
        return f"No remote code: `{name}` is a class of transformers.{_versions(config)}"
    file = str(next(iter(code.values()))).rpartition(".")[0] + ".py"
    return (
        f"Its class, `{name}`, is not one of transformers: `trust_remote_code=True` runs `{file}` of this repository "
        "and the files that it imports, and needs transformers 5. After `import uptrain` none of it runs. "
        "The tokenizer needs no code, but without `trust_remote_code=False` transformers asks and waits."
    )


def _versions(config: Mapping[str, Any]) -> str:
    """Return a sentence on the versions of transformers that read the rotary parameters; empty for all."""
    config = language_config(dict(config))
    if not config.get("rope_parameters"):
        return ""
    if "rope_theta" in config and config["rope_theta"] is None:
        return " It needs transformers 5: in transformers 4 the class has no scaled rotation and raises an error."
    if "rope_theta" in config or "rotary_emb_base" in config:
        return " config.json has its rotary parameters in the words of transformers 4 too."
    return (
        " It needs transformers 5: config.json has its rotary parameters as transformers 5 writes them, and "
        "transformers 4 would silently use its defaults."
    )


def _serving(repo: str, remote: bool, last: Mapping[str, Any], revision: str | None) -> str:
    at = f" --revision {revision}" if revision else ""
    latent = last.get("latent")
    served = f"```bash\nvllm serve {repo}{at}{' --trust-remote-code' if remote else ''}\n```"
    if latent:
        served += (
            "\n\ntransformers caches the latent, but expands all of it at every step. "
            f'`uptrain.load("{repo}")` decodes from the latent itself.'
        )
    return served
