"""What the embedded demo model has learnt: bits per byte of held-out text, against counting and compressing.

python -m benchmarks demo_quality
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math

import numpy as np

from benchmarks.common import options
from uptrain.checkpoint.source import DEMO
from uptrain.data.sources import HELD_OUT, Builtin
from uptrain.data.stdlib_text import documents
from uptrain.data.token_text import read_tokens
from uptrain.evaluation import EvaluationSettings, evaluate
from uptrain.models.loading import load_tokenizer

TRAIN = Builtin(builtin="python-stdlib")


def quality(tokens: int = 10**7) -> dict[str, float]:
    """Return bits per byte of the model, of a unigram model over its tokens, and of general compressors.

    The unigram counts come from the training text, with one added to each; compressors see all held-out text at once.
    """
    tokenizer = load_tokenizer(DEMO)
    held_out = read_tokens([HELD_OUT], tokenizer, 10**7)
    counts = np.bincount(read_tokens([TRAIN], tokenizer, 10**7).ids, minlength=len(tokenizer)) + 1
    text = "\n".join(documents("held-out")).encode()
    return {
        "model": evaluate("demo", EvaluationSettings(tokens=tokens, repeats=0)).model.bits_per_byte,
        "unigram": float(-np.log(counts / counts.sum())[held_out.ids].sum() / math.log(2) / held_out.bytes),
        "gzip": 8 * len(gzip.compress(text, 9)) / len(text),
        "bz2": 8 * len(bz2.compress(text, 9)) / len(text),
        "lzma": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }


def main() -> None:
    options().parse_args()
    print(json.dumps({name: round(value, 4) for name, value in quality().items()}, indent=2))
