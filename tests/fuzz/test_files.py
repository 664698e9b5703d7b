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
from tests.fuzz.hostile import as_json, damaged
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.convert import convert
from uptrain.models import load_tokenizer
from uptrain.request import Request


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


TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": None, "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "unk_token": None},
}  # fmt: skip
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}


@given(tokenizer=as_json(damaged(TOKENIZER)), settings_=as_json(damaged(SETTINGS, ("added_tokens_decoder",))))
@inputs(15)
def test_a_tokenizer_loads_or_is_refused_and_its_code_does_not_run(
    tokenizer: bytes, settings_: bytes, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    (tmp_path / "tokenizer_config.json").write_bytes(settings_)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    attempt(load_tokenizer, tmp_path)
    assert not (tmp_path / "ran").exists()


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
