"""The schema of a recipe: its sections and keys with defaults and limits. Needs no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from uptrain.data.sources import ParsedSource, Strict, TeacherText, has_chats, is_stream


class TokenizerSpec(Strict):
    """A byte-level BPE tokenizer to train on the recipe's data."""

    vocab_size: int = Field(gt=256)
    end_of_text: str = "<|endoftext|>"


class Distill(Strict):
    """Learning from a teacher: (1 − weight) · cross-entropy + weight · temperature² · KL(teacher ‖ student)."""

    teacher: str | None = None
    """The teacher; by default the model that this one was converted from, as uptrain.json says."""
    weight: float = Field(1.0, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)
    top_k: int | None = Field(None, gt=0)
    hidden_weight: float = Field(0.0, ge=0)


class Lora(Strict):
    """Low-rank adapters of peft, merged into the result; on attention unless `target_modules` names other modules."""

    r: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | None = None


class Recipe(Strict):
    """One training run.

    A recipe has either `model` or `config`. It has one length: `tokens`, `steps`, or `alpha` with `pretraining_tokens`.
    """

    model: str | None = None
    revision: str | None = None
    allow_pickle: bool = False
    """Whether to read `.bin` weights of the model and its teacher, with torch's restricted unpickler."""
    config: dict[str, Any] | None = None
    tokenizer: TokenizerSpec | str | None = None
    output: Path
    overwrite: bool = False
    dtype: Literal["bfloat16", "float16", "float32"] | None = None

    data: list[ParsedSource] = Field(min_length=1)
    held_out: list[ParsedSource] = Field([])
    held_out_tokens: int = Field(65_536, gt=0)
    held_out_block_size: int | None = Field(None, gt=1)
    """Default: `block_size`. Short blocks train well, but a model should be scored at the length of its use."""
    block_size: int = Field(1024, gt=1)
    isolate_documents: bool | None = None
    """Whether attention stays inside each document of a block; by default wherever the model's class can do that."""

    distill: Distill | None = None
    train: Literal["all", "attention"] = "all"
    lora: Lora | None = None

    tokens: int | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0)
    alpha: float | None = Field(None, gt=0, le=1)
    pretraining_tokens: float | None = Field(None, gt=0)
    batch_size: int = Field(8, gt=0)
    gradient_accumulation: int = Field(1, gt=0)

    learning_rate: float = Field(1e-4, gt=0)
    attention_learning_rate: float | None = Field(None, gt=0)
    schedule: Literal["cosine", "1-sqrt", "linear", "wsd", "constant"] = "cosine"
    decay: float = Field(0.2, gt=0, le=1)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    warmup: float = Field(0.03, ge=0)
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    fsdp: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    attn_implementation: str | None = None
    seed: int = Field(0, ge=0)

    on_bad_loss: Literal["stop", "skip"] = "stop"
    spike: float | None = Field(None, gt=1)

    trackers: list[Literal["tensorboard", "wandb"]] = Field([])
    log_every: int = Field(10, gt=0)
    save_every: int = Field(500, gt=0)
    eval_every: int | None = Field(None, gt=0)
    eval_every_tokens: int | None = Field(None, gt=0)
    keep: Literal["last", "best"] = "last"

    # One validator per subject, in the order in which a recipe's first mistake is reported.

    @model_validator(mode="after")
    def _check_model(self) -> Recipe:
        if (self.model is None) == (self.config is None):
            raise ValueError("give either model (a checkpoint to train) or config (to train from scratch)")
        return self

    @model_validator(mode="after")
    def _check_length(self) -> Recipe:
        if sum(length is not None for length in (self.tokens, self.steps, self.alpha)) != 1:
            raise ValueError("give one of tokens, steps and alpha, the length of the run")
        if (self.alpha is None) != (self.pretraining_tokens is None):
            raise ValueError("alpha is a share of pretraining_tokens: give both (alpha: 0.05 is the paper's)")
        return self

    @model_validator(mode="after")
    def _check_trained_weights(self) -> Recipe:
        if self.lora is not None and self.train == "attention":
            raise ValueError("lora says what trains by its target_modules (attention unless named): leave train out")
        return self

    @model_validator(mode="after")
    def _check_teacher(self) -> Recipe:
        if self.config is not None and self.distill is not None and self.distill.teacher is None:
            raise ValueError("a new model was converted from nothing: name distill.teacher")
        return self

    @model_validator(mode="after")
    def _check_evaluations(self) -> Recipe:
        if self.eval_every is not None and self.eval_every_tokens is not None:
            raise ValueError("give either eval_every (steps) or eval_every_tokens")
        if self.keep == "best" and not (self.held_out and self.steps_between_evaluations):
            raise ValueError("keep: best needs held_out text and eval_every or eval_every_tokens to choose by")
        return self

    @model_validator(mode="after")
    def _check_tokenizer(self) -> Recipe:
        if self.config is not None and self.tokenizer is None:
            raise ValueError("training from a config needs a tokenizer: a name, or a mapping with vocab_size")
        if self.model is not None and isinstance(self.tokenizer, TokenizerSpec):
            raise ValueError("a checkpoint keeps its own tokenizer: a new one would make its embeddings meaningless")
        return self

    @model_validator(mode="after")
    def _check_batch(self) -> Recipe:
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"gradient_accumulation {self.gradient_accumulation} must divide batch_size {self.batch_size}, "
                "which counts a whole step's sequences"
            )
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> Recipe:
        weighted = [source.weight is not None for source in self.data]
        if any(weighted) and not all(weighted):
            raise ValueError("give every source in data a weight, or none of them")
        if any(source.weight is not None for source in self.held_out):
            raise ValueError("held_out is read in order, so its sources have no weight; weights belong in data")
        return self

    @model_validator(mode="after")
    def _check_teacher_text(self) -> Recipe:
        new_tokenizer = isinstance(self.tokenizer, TokenizerSpec)
        if new_tokenizer and any(map(has_chats, [*self.data, *self.held_out])):
            raise ValueError("chat_field needs a tokenizer with a chat template, and one trained on the data has none")
        if any(isinstance(source, TeacherText) for source in self.held_out):
            raise ValueError("held_out must be real text: what the teacher writes says nothing about other text")
        if new_tokenizer and any(isinstance(source, TeacherText) for source in self.data):
            raise ValueError("a tokenizer can't be trained on the teacher's text, which has the teacher's own tokens")
        return self

    @model_validator(mode="after")
    def _check_readers(self) -> Recipe:
        alone = [source for source in self.data if isinstance(source, TeacherText) or is_stream(source)]
        if alone and len(self.data) > 1 and any(source.weight is None for source in self.data):
            kind = "the teacher" if isinstance(alone[0], TeacherText) else "a streamed dataset"
            raise ValueError(f"{kind} must be the only source in data, or every source needs a weight")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens per optimizer step, over all processes and micro-batches."""
        return self.batch_size * self.block_size

    @property
    def scored_block_size(self) -> int:
        """Return the tokens per block of held-out text."""
        return self.held_out_block_size or self.block_size

    @property
    def total_steps(self) -> int:
        """Return the number of optimizer steps of the run."""
        if self.steps is not None:
            return self.steps
        share = (self.alpha or 0) * (self.pretraining_tokens or 0)
        return math.ceil((self.tokens or share) / self.tokens_per_step)

    @property
    def steps_between_evaluations(self) -> int | None:
        """Return the number of optimizer steps between two evaluations; None for a run without them."""
        if self.eval_every_tokens is not None:
            return max(1, round(self.eval_every_tokens / self.tokens_per_step))
        return self.eval_every

    @property
    def warmup_steps(self) -> int:
        """Return the number of warm-up steps: `warmup`, or that share of the run where it is below 1."""
        share = self.warmup * self.total_steps if self.warmup < 1 else self.warmup
        return min(self.total_steps, math.ceil(share))

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain JSON values, without keys that are None."""
        return self.model_dump(mode="json", exclude_none=True)
