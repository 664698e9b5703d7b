"""Several texts in one option: their names and weights, their shares of the blocks, and their conversations."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.corpus import tokenizer
from uptrain.data.sources import Builtin, Files, weighted_names
from uptrain.data.weighted_texts import allotted, read_blocks, weighted_texts
from uptrain.errors import UsageError


def test_names_and_weights_are_taken_apart_and_an_existing_file_is_never_taken_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert weighted_names("--calibrate", "en.txt:2, code/*.py:0.5,builtin") == {
        "en.txt": 2,
        "code/*.py": 0.5,
        "builtin": 1,
    }
    assert weighted_names("--calibrate", r"C:\texts\en.txt") == {r"C:\texts\en.txt": 1}
    assert weighted_names("--calibrate", "python-stdlib:held-out:3") == {"python-stdlib:held-out": 3}
    for name in ("one,two.txt", "notes:2"):
        Path(name).write_text("text")
    assert weighted_names("--calibrate", "one,two.txt") == {"one,two.txt": 1}
    assert weighted_names("--calibrate", "notes:2,other.txt:3") == {"notes:2": 1, "other.txt": 3}
    assert weighted_names("--calibrate", "one,two.txt:3, notes:2:4,x.txt") == {
        "one,two.txt": 3,
        "notes:2": 4,
        "x.txt": 1,
    }


@pytest.mark.parametrize(
    ("value", "said"),
    [("en.txt:0", "weight 0"), ("en.txt:-1", "weight -1"), ("en.txt:many", "weight many"), ("a.txt:inf", "weight inf"),
     ("a.txt,,b.txt", "empty"), ("a.txt,a.txt:2", "twice"), ("", "empty")],
)  # fmt: skip
def test_what_is_no_list_of_texts_and_weights_is_refused(value: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        weighted_names("--calibrate", value)


@pytest.mark.parametrize("weights", [[1.0], [2.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.3, 5.0, 2.2, 0.01]])
@pytest.mark.parametrize("total", [1, 7, 64, 1000])
def test_shares_are_whole_add_up_and_are_within_one_of_the_exact_share(weights: list[float], total: int) -> None:
    found = allotted(total, weights)
    assert sum(found) == total
    for blocks, weight in zip(found, weights, strict=True):
        assert abs(blocks - total * weight / sum(weights)) < 1


def write(path: Path, word: str, count: int) -> Path:
    path.write_text(" ".join([word] * count))
    return path


def test_blocks_have_the_texts_shares_and_every_stretch_of_them_too(tmp_path: Path) -> None:
    reader = tokenizer()
    names = [write(tmp_path / f"{word}.txt", word, 4000) for word in ("the", "of", "and")]
    value = f"{names[0]}:2,{names[1]},{names[2]}:1"
    found = read_blocks("--calibrate", weighted_texts("--calibrate", value), reader, 40 * 16 + 5, 16)
    assert found.ids.shape == (40, 16) and Counter(found.text_of) == {0: 20, 1: 10, 2: 10}
    for stretch in range(0, 40, 8):
        assert Counter(found.text_of[stretch : stretch + 8])[0] in (3, 4, 5)
    # Every block is its own text's, in order: put together again, they are the text's tokens.
    for index, name in enumerate(names):
        own = found.ids[np.array(found.text_of) == index].ravel()
        assert own.tolist() == reader(name.read_text(), add_special_tokens=False)["input_ids"][: own.size]


def test_what_a_short_text_lacks_the_others_have(tmp_path: Path) -> None:
    reader = tokenizer()
    short, long, other = (write(tmp_path / f"{n}.txt", n, c) for n, c in (("the", 60), ("of", 9000), ("and", 9000)))
    tokens = len(reader(short.read_text(), add_special_tokens=False)["input_ids"])
    value = f"{short}:2,{long}:1,{other}:3"
    found = read_blocks("--calibrate", weighted_texts("--calibrate", value), reader, 60 * 16, 16)
    own = tokens // 16
    assert own < 20, "the text is not short"
    assert [read.blocks for read in found.texts] == [own, *allotted(60 - own, [1, 3])]
    assert found.short == (str(short),)


def test_a_share_below_two_blocks_is_refused(tmp_path: Path) -> None:
    one, other = (write(tmp_path / f"{word}.txt", word, 4000) for word in ("the", "of"))
    with pytest.raises(UsageError, match="share of 1 of 10 blocks"):
        read_blocks("--calibrate", weighted_texts("--calibrate", f"{one}:9,{other}:1"), tokenizer(), 160, 16)
    with pytest.raises(UsageError, match="less than two blocks of 16"):
        read_blocks("--calibrate", weighted_texts("--calibrate", str(write(one, "the", 3))), tokenizer(), 160, 16)


def test_conversations_are_found_in_rows_and_text_comes_first(tmp_path: Path) -> None:
    chat, both = tmp_path / "chat.jsonl", tmp_path / "both.jsonl"
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    chat.write_text(json.dumps({"id": 1, "messages": messages}) + "\n")
    both.write_text(json.dumps({"text": "hello", "messages": messages}) + "\n")
    found = weighted_texts("--calibrate", f"{chat}:3,{both},builtin")
    assert [text.weight for text in found] == [3, 1, 1]
    assert isinstance(found[0].source, Files) and found[0].source.chat_field == "messages"
    assert isinstance(found[1].source, Files) and found[1].source.chat_field is None
    assert isinstance(found[2].source, Builtin)
