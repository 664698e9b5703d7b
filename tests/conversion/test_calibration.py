"""`--method calibrated` at the command line: what it promises of its result, and of text that won't do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import tiny_config, tiny_model
from tests.conversion.test_families import load
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.manifest import read_manifest, verify
from uptrain.checkpoint.source import DEMO
from uptrain.cli.app import run
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.conversion.run.options import RunOptions
from uptrain.evaluation import EvaluationSettings, evaluate

SHORT: dict[str, Any] = {"calibration_tokens": 2048, "repair_steps": 0}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def mqa(name: str, memory: int = 2**30, **settings: Any) -> Path:
    convert(
        "demo", name, Request("mqa", method="calibrated", **{**SHORT, **settings}), options=RunOptions(memory=memory)
    )
    return Path(name)


def stage(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    assert manifest is not None
    found: dict[str, Any] = manifest["stages"][-1]
    return found


@pytest.mark.slow
def test_it_is_closer_than_svd_and_says_what_it_did() -> None:
    calibrated = mqa("calibrated")
    convert("demo", "svd", Request("mqa", method="svd"))
    settings = EvaluationSettings(tokens=4096, repeats=0)
    found = [evaluate(str(name), settings, baseline="demo").kl for name in (calibrated, "svd")]
    assert found[0] < found[1]
    notes = stage(calibrated)["calibration"]
    assert notes["text"]["tokens"] == 2048 and notes["text"]["token_digest"].startswith("blake3:")
    assert [layer["choice"] is not None for layer in notes["layers"]] == [True] * 4
    for kept in stage(calibrated)["energy_kept"].values():
        for side in ("keys", "values"):
            assert kept["calibrated"][side] >= max(kept["svd"][side], kept["mean"][side]) - 1e-4
    verify(calibrated)
    assert not Path("calibrated.uptrain-calibration").exists()


@pytest.mark.slow
def test_twice_gives_the_same_logits_and_files_for_activations_change_nothing() -> None:
    one, two = mqa("one"), mqa("two", memory=1)
    assert stage(one)["calibration"]["text"] == stage(two)["calibration"]["text"]
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(load(one)(tokens).logits, load(two)(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "told"), [(1, True), (2**40, False)])
def test_it_says_when_one_layer_alone_takes_more_than_it_may_hold(memory: int, told: bool) -> None:
    notes: list[str] = []
    request = Request("mqa", method="calibrated", **SHORT)
    convert("demo", "out", request, options=RunOptions(memory=memory), events=Events(note=notes.append))
    assert any("more than the 1 B of --memory" in note for note in notes) == told


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's peak")
def test_what_it_says_it_will_hold_is_what_it_holds() -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 1, "vocab_size": 4096}
    tiny_model(tiny_config("llama", **sizes, max_position_embeddings=256)).save_pretrained("source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, "source")
    script = (
        "import re; from pathlib import Path\n"
        "from uptrain.conversion.run.convert import convert; from uptrain.conversion.request import Request\n"
        "request = Request('mqa', method='calibrated', calibration_tokens=1024, repair_steps=0)\n"
        "from uptrain.checkpoint.events import Events; from uptrain.conversion.run.options import RunOptions\n"
        "events = Events(note=lambda note: print(note, flush=True))\n"
        "convert('source', 'out', request, options=RunOptions(memory=1), events=events)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    note, *_, peak = done.stdout.splitlines()
    told = re.search(r"will hold about ([\d.]+) MiB", note)
    assert told is not None
    assert 0.95 < float(told[1]) / (int(peak) / 1024) < 1.3


def test_as_many_groups_as_heads_is_the_source() -> None:
    convert("demo", "same", Request("gqa", 8, "calibrated"))
    source, same = load_file(DEMO / "model.safetensors"), load_file("same/model.safetensors")
    assert all(torch.equal(source[name], same[name]) for name in source)


@pytest.mark.slow
def test_a_finished_calibration_is_not_repeated_when_writing_was_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(import_module("uptrain.conversion.run.build"), "write_companions", broken)
        with pytest.raises(RuntimeError):
            mqa("out")
    assert Path("out.uptrain-calibration/calibration.json").is_file() and not Path("out").exists()
    with monkeypatch.context() as patch:
        patch.setattr("uptrain.conversion.calibration.run.calibrate", broken)
        mqa("out")
    assert Path("out/model.safetensors").is_file() and not Path("out.uptrain-calibration").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"too short for two blocks", "less than two blocks"),
        (bytes(range(256)) * 40, "UTF-8"),
    ],
)
def test_text_that_will_not_do_is_one_sentence(content: bytes, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_bytes(content)
    assert run(["convert", "demo", "out", "--to", "mqa", "--method", "calibrated", "--calibrate", "text.txt"]) in (1, 2)
    error = " ".join(capsys.readouterr().err.split())
    assert says in error and "text.txt" in error and "Traceback" not in error
    assert not Path("out").exists()


@pytest.mark.slow
def test_another_script_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text("漢字仮名交じり文を書く。" * 400, encoding="utf-8")
    arguments = ["--calibrate", "text.txt", "--calibration-tokens", "2048", "--repair-steps", "0", "--json"]
    assert run(["convert", "demo", "out", "--to", "mqa", "--method", "calibrated", *arguments]) == 0
    captured = capsys.readouterr()
    assert "tokens per byte" in " ".join(captured.err.split())
    assert json.loads(captured.out)["host"] == "gpt_bigcode"
