"""Our own model classes: one entry per modelling file in `uptrain/models/remote_code`. Data only, cheap to import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_OWN_ATTENTION = "its attention is code of its own, which vLLM's backend for transformers can't replace"
_LATENT = "vLLM has no class for this latent"


@dataclass(frozen=True, kw_only=True)
class OwnClass:
    """One modelling file and the classes in it.

    - `model_type`: what config.json calls the family.
    - `name`: how the classes' names begin.
    - `head`: how the name of the class with the language model's head ends.
    - `auto_class`: the Auto class of transformers that loads it.
    - `not_in_vllm`: why vLLM can't load it, empty where it can.
    """

    model_type: str
    name: str
    head: str = "ForCausalLM"
    auto_class: str = "AutoModelForCausalLM"
    not_in_vllm: str = ""

    @property
    def module(self) -> str:
        """Return the name of the modelling file, without its ending."""
        return f"modeling_{self.model_type}"

    @property
    def config_class(self) -> str:
        """Return the name of the config's class."""
        return f"{self.name}Config"

    @property
    def model_class(self) -> str:
        """Return the name of the class that ends with the last hidden states."""
        return f"{self.name}Model"

    @property
    def head_class(self) -> str:
        """Return the name of the class with the language model's head."""
        return self.name + self.head

    @property
    def auto_classes(self) -> dict[str, str]:
        """Return the class that each Auto class loads."""
        return {"AutoConfig": self.config_class, "AutoModel": self.model_class, self.auto_class: self.head_class}


_SEQ2SEQ = {"head": "ForConditionalGeneration", "auto_class": "AutoModelForSeq2SeqLM"}
_SPEECH = {"head": "ForConditionalGeneration", "auto_class": "AutoModelForSpeechSeq2Seq"}

OWN_CLASSES: Mapping[str, OwnClass] = MappingProxyType(
    {
        each.model_type: each
        for each in (
            OwnClass(model_type="uptrain_gpt2", name="UptrainGPT2", head="LMHeadModel"),
            OwnClass(model_type="uptrain_bloom", name="UptrainBloom", not_in_vllm=_OWN_ATTENTION),
            OwnClass(model_type="uptrain_gpt_neo", name="UptrainGPTNeo", not_in_vllm=_OWN_ATTENTION),
            OwnClass(model_type="uptrain_mpt", name="UptrainMpt", not_in_vllm=_OWN_ATTENTION),
            OwnClass(model_type="uptrain_bart", name="UptrainBart", **_SEQ2SEQ),
            OwnClass(model_type="uptrain_umt5", name="UptrainUMT5", **_SEQ2SEQ),
            OwnClass(model_type="uptrain_whisper", name="UptrainWhisper", **_SPEECH),
            OwnClass(model_type="uptrain_t5", name="UptrainT5", **_SEQ2SEQ),
            OwnClass(model_type="uptrain_opt", name="UptrainOPT"),
            OwnClass(model_type="uptrain_persimmon", name="UptrainPersimmon"),
            OwnClass(model_type="uptrain_gpt2_mla", name="UptrainGPT2MLA", head="LMHeadModel", not_in_vllm=_LATENT),
            OwnClass(model_type="uptrain_llama_mla", name="UptrainLlamaMLA", not_in_vllm=_LATENT),
        )
    }
)
"""By `model_type`. The modelling file itself names its classes once more, since it must load without uptrain."""
