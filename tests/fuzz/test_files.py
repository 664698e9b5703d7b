"""Pickles and tokenizers: read only when asked for, never run, and refused in a sentence when they are broken."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.attempt import attempt, inputs
from tests.fuzz.hostile import as_json, damaged, retouched
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.data.text_encoder import TextEncoder
from uptrain.models.loading import load_tokenizer


def pickled(values: Any) -> bytes:
    file = io.BytesIO()
    torch.save(values, file)
    return file.getvalue()


PLAIN = pickled({"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2, dtype=torch.int8)})
OTHERS = [
    pickled({"a": torch.zeros(2, 2).to_sparse()}), pickled({1: torch.zeros(1)}), pickled([torch.zeros(1)]),
    pickled({"a": torch.zeros(1, dtype=torch.complex64)}), pickled({"a": {"b": torch.zeros(1)}}), pickled({}),
    pickled({"a": torch.zeros(1).expand(2**40)}), pickle.dumps({"a": 1}),
]  # fmt: skip


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from([PLAIN, PLAIN, PLAIN, *OTHERS])))
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.integers(0, 3)) == 0:
            del data[draw(st.integers(0, len(data))) :]
        elif data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@given(data=broken())
@inputs(60)
def test_a_pickle_is_weights_or_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    assert "--allow-pickle" in attempt(open_checkpoint, tmp_path)[1]
    attempt(open_checkpoint, tmp_path, allow_pickle=True)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TOKENIZER: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": BYTES, "post_processor": None, "decoder": BYTES,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "unk_token": None},
}  # fmt: skip
WORDS = {"a": 0, "b": 1, "ab": 2, "##b": 3, "[UNK]": 4}
PARTS: dict[str, list[Any]] = {
    "model": [
        TOKENIZER["model"],
        {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0], ["b", -2.0]], "byte_fallback": False},
        {"type": "WordPiece", "vocab": WORDS, "unk_token": "[UNK]", "continuing_subword_prefix": "##",
         "max_input_chars_per_word": 100},
        {"type": "WordLevel", "vocab": WORDS, "unk_token": "[UNK]"},
    ],
    "normalizer": [
        None, {"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "},
        {"type": "Replace", "pattern": {"String": "x"}, "content": "y"}, {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "StripAccents"}]},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    ],
    "pre_tokenizer": [
        None, BYTES, {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False},
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        {"type": "Digits", "individual_digits": True}, {"type": "FixedLength", "length": 3},
        {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {"type": "Digits", "individual_digits": False}]},
    ],
    "post_processor": [
        None, BYTES, {"type": "RobertaProcessing", "sep": ["b", 1], "cls": ["a", 0], "trim_offsets": True,
                      "add_prefix_space": False},
        {"type": "TemplateProcessing", "special_tokens": {"a": {"id": "a", "ids": [0], "tokens": ["a"]}},
         "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
         "pair": [{"Sequence": {"id": "B", "type_id": 1}}]},
    ],
    "truncation": [None, {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}],
    "padding": [None, {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                       "pad_type_id": 0, "pad_token": "a"}],
    "added_tokens": [[], [{"id": 7, "content": "zz", "single_word": False, "lstrip": False, "rstrip": False,
                           "normalized": False, "special": True}]],
}  # fmt: skip
TOKENIZERS = [TOKENIZER | {"model": model} for model in PARTS["model"]]
tokenizers = st.fixed_dictionaries({name: st.sampled_from(parts) for name, parts in PARTS.items()}).flatmap(
    lambda parts: retouched(TOKENIZER | parts)
)
"""Parts as they come, each with a few of its values changed."""
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
TEXT = ["ab a b\n", "", "Ünïcode \u2603 " + "x" * 300]


def load(folder: Path, tokenizer: bytes, settings_: bytes) -> tuple[Any, str]:
    """Load and use a tokenizer of these two files; return its tokens, or the sentence that refused it."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_bytes(tokenizer)
    (folder / "tokenizer_config.json").write_bytes(settings_)
    loaded, sentence = attempt(load_tokenizer, folder)
    return (None, sentence) if sentence else attempt(TextEncoder(loaded).tokens_of, TEXT)


@given(
    tokenizer=tokenizers.map(lambda made: json.dumps(made).encode()) | as_json(damaged(TOKENIZER)),
    settings_=st.just(json.dumps(SETTINGS).encode()) | as_json(damaged(SETTINGS, ("added_tokens_decoder",))),
)
@inputs(60)
def test_a_tokenizer_loads_or_is_refused_and_its_code_does_not_run(
    tokenizer: bytes, settings_: bytes, tmp_path: Path
) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load(tmp_path, tokenizer, settings_)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda found: found["model"]["type"])
def test_what_is_damaged_was_right(tokenizer: Any, tmp_path: Path) -> None:
    """Or all of the tokenizers above would be refused for what they have in common."""
    tokens, sentence = load(tmp_path, json.dumps(tokenizer).encode(), json.dumps(SETTINGS).encode())
    assert not sentence and len(tokens) == len(TEXT) and tokens[0]


PANICS = {
    "a map of characters that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a pattern that matches nothing": {
        "normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 8}
    },
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a second text where there is one": {
        "post_processor": {"type": "TemplateProcessing", "special_tokens": {}, "pair": [],
                           "single": [{"Sequence": {"id": "B", "type_id": 0}}]},
    },
    "an unknown word without a token": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}},
}  # fmt: skip
"""What makes the tokenizers library give up; all but the last by a panic, which no handler of exceptions sees."""


@pytest.mark.parametrize("damage", PANICS.values(), ids=PANICS)
def test_what_panics_in_a_tokenizers_library_is_one_sentence(damage: dict[str, Any], tmp_path: Path) -> None:
    _, sentence = load(tmp_path, json.dumps(TOKENIZER | damage).encode(), json.dumps(SETTINGS).encode())
    assert "tokenizer" in sentence


def test_a_conversion_copies_a_tokenizer_without_reading_it(tmp_path: Path) -> None:
    from tests.small import save_small

    source = save_small(tmp_path / "src")
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        (source / name).write_bytes(b"\xff{{ ''.__class__ }}")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    convert(str(source), tmp_path / "out", Request("mqa"))
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.fixture(autouse=True)
def _warnings_are_transformers_own(recwarn: pytest.WarningsRecorder) -> None:
    """A broken tokenizer may be warned of as it likes."""
