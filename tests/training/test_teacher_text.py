"""The teacher's text is a plain sample of the teacher, the same however often the writing was cut off."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import tiny_config, tiny_model
from tests.corpus import checkpoint, corpus, sentences, tokenizer
from uptrain.data.mixture import Mixture
from uptrain.data.readers import build_tokens, open_reader
from uptrain.data.sources import Files, TeacherText
from uptrain.data.text_encoder import TextEncoder
from uptrain.data.token_file import TokenFile
from uptrain.errors import UptrainError, UsageError
from uptrain.models.loading import load_model
from uptrain.models.opened import open_model
from uptrain.training import recipes
from uptrain.training.teacher_sampler import Sampler
from uptrain.training.teacher_text import generate_tokens, teacher_digest


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer()


@pytest.fixture(scope="module")
def model(words: Any) -> Any:
    special = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return tiny_model(tiny_config("llama", **special))


def sampler(model: Any, tokenizer: Any, source: TeacherText, block_size: int, seed: int) -> Sampler:
    return Sampler(model, TextEncoder(tokenizer), source, block_size, seed)


def teacher(**changes: Any) -> TeacherText:
    return TeacherText.model_validate({"source": "teacher", "tokens": 500, "batch_size": 4, **changes})


def tokens(folder: Path) -> list[int]:
    meta = json.loads((folder / "tokens.json").read_text())
    return np.fromfile(folder / "tokens.bin", dtype=meta["dtype"]).tolist()


def test_no_batch_and_no_seed_writes_what_another_wrote(tmp_path: Path, model: Any, words: Any) -> None:
    generate_tokens(sampler(model, words, teacher(), 32, 0), tmp_path / "one")
    generate_tokens(sampler(model, words, teacher(), 32, 1), tmp_path / "other")
    found = [split(tokens(tmp_path / name), words.eos_token_id) for name in ("one", "other")]
    long = [tuple(ids) for documents in found for ids in documents if len(ids) > 8]
    assert len(long) > 20
    assert len(set(long)) == len(long)


class Killed(Exception):
    pass


def kill_after(batches: int) -> Callable[[int], None]:
    told: list[int] = []

    def on_tokens(count: int) -> None:
        told.append(count)
        if len(told) == batches:
            raise Killed

    return on_tokens


def test_it_is_as_many_tokens_as_asked_for_and_says_how_far_it_is(tmp_path: Path, model: Any, words: Any) -> None:
    told: list[int] = []
    generate_tokens(sampler(model, words, teacher(), 32, 0), tmp_path / "t", told.append)
    reader = TokenFile(tmp_path / "t", 32, 0)
    assert reader.count.tokens == sum(told) == len(tokens(tmp_path / "t")) == 500
    assert len(told) > 2
    assert reader.take(2).shape == (2, 32)
    documents = split(tokens(tmp_path / "t"), words.eos_token_id)
    assert reader.count.documents == len(documents)
    assert reader.count.bytes == sum(len(words.decode(ids).encode()) for ids in documents)
    assert max(map(len, documents)) == 31


def split(ids: list[int], separator: int) -> list[list[int]]:
    out: list[list[int]] = [[]]
    for token in ids:
        if token == separator:
            out.append([])
        else:
            out[-1].append(token)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("torn", [b"\x01", b"\x01\x00" * 50], ids=["half a token", "tokens"])
def test_a_killed_run_ends_with_the_same_tokens_and_samples_no_batch_twice(
    tmp_path: Path, model: Any, words: Any, prompted: bool, torn: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = str(prompt_file(tmp_path)) if prompted else None
    source = teacher(tokens=300, prompts=prompts, prompt_tokens=5)
    generate_tokens(sampler(model, words, source, 16, 1), tmp_path / "whole")
    calls: list[int] = []
    sample = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: (calls.append(1), sample(**options))[1])
    for batches in (2, 3):
        with pytest.raises(Killed):
            generate_tokens(sampler(model, words, source, 16, 1), tmp_path / "cut", kill_after(batches))
        with (tmp_path / "cut/tokens.bin").open("ab") as file:
            file.write(torn)
        torch.manual_seed(99)
    told: list[int] = []
    generate_tokens(sampler(model, words, source, 16, 1), tmp_path / "cut", told.append)
    for name in ("tokens.bin", "tokens.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sum(told) == 300
    assert len(calls) == json.loads((tmp_path / "cut/progress.json").read_text())["batches"]
    generate_tokens(sampler(model, words, source, 16, 1), tmp_path / "cut", kill_after(1))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_teachers_own_distribution(tmp_path: Path, words: Any, temperature: float) -> None:
    special = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = tiny_model(tiny_config("llama", initializer_range=0.4, **special)).train()
    model.generation_config.top_k = 2
    model.generation_config.min_p = 0.3
    source = teacher(tokens=4000, temperature=temperature, batch_size=1000)
    generate_tokens(sampler(model, words, source, 2, 0), tmp_path / "t")
    assert model.training
    assert model.generation_config.top_k == 2
    with torch.no_grad():
        logits = model(torch.tensor([[words.bos_token_id]])).logits[0, -1]
    expected = torch.softmax(logits.double() / temperature, -1)
    expected[words.eos_token_id] = 0
    expected /= expected.sum()
    drawn = [ids[0] for ids in split(tokens(tmp_path / "t"), words.eos_token_id) if ids]
    found = torch.bincount(torch.tensor(drawn), minlength=len(words)).double() / len(drawn)
    # Every share within five standard deviations of the sample.
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / len(drawn)).sqrt() + 1e-3).all()


def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    texts = ["fox", *(sentences(2, seed) for seed in range(6)), "a"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_documents_begin_as_the_prompts_do_in_their_order_again_and_again(
    tmp_path: Path, model: Any, words: Any
) -> None:
    source = teacher(prompts=str(prompt_file(tmp_path)), prompt_tokens=5)
    generate_tokens(sampler(model, words, source, 32, 1), tmp_path / "t")
    begun = [ids[:5] for ids in split(tokens(tmp_path / "t"), words.eos_token_id)][:-1]
    oracle = [words.backend_tokenizer.encode(sentences(2, seed)).ids[:5] for seed in range(6)]
    assert len(begun) > 12
    assert begun == [oracle[index % 6] for index in range(len(begun))]


def test_whatever_changes_the_text_changes_the_digest_and_a_folder_of_other_text_is_written_anew(
    tmp_path: Path, model: Any, words: Any
) -> None:
    source = teacher()
    other = tiny_model(model.config, seed=1)
    prompts = str(prompt_file(tmp_path))
    digests = {
        teacher_digest(sampler(model, words, source, 32, 0)), teacher_digest(sampler(other, words, source, 32, 0)),
        teacher_digest(sampler(model, words, source, 16, 0)), teacher_digest(sampler(model, words, source, 32, 1)),
        teacher_digest(sampler(model, words, teacher(temperature=0.9), 32, 0)),
        teacher_digest(sampler(model, words, teacher(tokens=501), 32, 0)),
        teacher_digest(sampler(model, words, teacher(prompts=prompts), 32, 0)),
        teacher_digest(sampler(model, tokenizer(290), source, 32, 0)),
    }  # fmt: skip
    assert len(digests) == 8
    assert teacher_digest(sampler(model, words, teacher(weight=2), 32, 0)) in digests

    with pytest.raises(Killed):
        generate_tokens(sampler(other, words, source, 32, 0), tmp_path / "t", kill_after(2))
    generate_tokens(sampler(model, words, source, 32, 0), tmp_path / "t")
    generate_tokens(sampler(model, words, source, 32, 0), tmp_path / "fresh")
    assert tokens(tmp_path / "t") == tokens(tmp_path / "fresh")


def test_a_checkpoint_loaded_again_goes_on_with_its_text(tmp_path: Path, words: Any) -> None:
    from uptrain.checkpoint.source import resolve

    checkpoint(tmp_path / "model")
    first, again = (load_model(open_model(resolve(str(tmp_path / "model")))) for _ in range(2))
    assert teacher_digest(sampler(first, words, teacher(), 32, 0)) == teacher_digest(
        sampler(again, words, teacher(), 32, 0)
    )


def test_it_can_be_part_of_a_mixture(tmp_path: Path, model: Any, words: Any) -> None:
    data = [
        {"source": "teacher", "tokens": 500, "weight": 1},
        {"files": str(corpus(tmp_path / "a.txt", 40)), "weight": 1},
    ]
    recipe = recipes.parse_recipe({"model": "m", "output": "o", "steps": 1, "data": data})

    def generate(source: TeacherText, folder: Path) -> None:
        generate_tokens(sampler(model, words, source, 32, 0), folder)

    folders = build_tokens(recipe.data, TextEncoder(words), tmp_path / "run", generate=generate)
    reader = open_reader(recipe.data, TextEncoder(words), folders, 32, 0)
    assert isinstance(reader, Mixture)
    assert reader.take(8).shape == (8, 32)
    with pytest.raises(UsageError, match="the run has no teacher"):
        build_tokens(recipe.data, TextEncoder(words), tmp_path / "run")


def test_what_cannot_be_written_is_one_sentence(
    tmp_path: Path, model: Any, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Files(files=str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_text("fox")
    with pytest.raises(UsageError, match="8 tokens"):
        generate_tokens(sampler(model, words, teacher(prompts=short), 32, 0), tmp_path / "t")
    with pytest.raises(UsageError, match=r"prompt_tokens.*32"):
        generate_tokens(sampler(model, words, teacher(prompts=short, prompt_tokens=32), 32, 0), tmp_path / "t")
    nameless = tokenizer()
    nameless.bos_token = nameless.eos_token = None
    with pytest.raises(UsageError, match="begins or ends a text"):
        generate_tokens(sampler(model, nameless, teacher(), 32, 0), tmp_path / "t")
    (tmp_path / "file").write_text("")
    with pytest.raises(UptrainError, match="can't be written to"):
        generate_tokens(sampler(model, words, teacher(), 32, 0), tmp_path / "file/t")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(UptrainError, match="No space left"):
            generate_tokens(sampler(model, words, teacher(), 32, 0), tmp_path / "t")
    mute = tiny_model(model.config)
    monkeypatch.setattr(mute, "generate", lambda input_ids, **options: torch.nn.functional.pad(input_ids, (0, 1)))
    with pytest.raises(UptrainError, match="before its first token"):
        generate_tokens(sampler(mute, words, teacher(), 32, 0), tmp_path / "t2")
