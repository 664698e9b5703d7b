"""The tokenizer of a run: the checkpoint's, the one a recipe names, or a new one trained on the recipe's data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerFast

from uptrain.checkpoint.source import Source, resolve
from uptrain.data.documents import pieces
from uptrain.models import loading
from uptrain.training.recipe import Recipe, TokenizerSpec


def make_tokenizer(recipe: Recipe, model: Source | None, folder: Path, accelerator: Accelerator) -> Any:
    """Load the tokenizer that a recipe names, or train the one it describes.

    - `recipe`: names a tokenizer, describes one, or leaves the choice to the model.
    - `model`: the checkpoint to train; None for a new model, whose recipe has a tokenizer.
    - `folder`: where a new tokenizer is stored, so that it is trained once per run.
    - `accelerator`: lets the first process train the tokenizer and the others load it.
    """
    spec = recipe.tokenizer
    if isinstance(spec, TokenizerSpec):
        with accelerator.main_process_first():
            if not folder.is_dir():
                texts = (piece.text for piece in pieces(recipe.data))
                partial = folder.with_suffix(".partial")
                new_tokenizer(spec, texts).save_pretrained(partial)
                partial.rename(folder)
        place = folder
    elif spec is not None:
        place = resolve(spec).path
    else:
        assert model is not None
        place = model.path
    return loading.load_tokenizer(place)


def new_tokenizer(spec: TokenizerSpec, texts: Iterator[str]) -> Any:
    """Train a byte-level BPE tokenizer on texts; it can encode any bytes.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=[spec.end_of_text],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = spec.end_of_text
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)
