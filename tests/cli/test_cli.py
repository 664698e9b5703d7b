"""What a person meets at the command line: one clear sentence, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from uptrain.cli import console
from uptrain.cli.app import run
from uptrain.cli.types import Size

Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run a command that must fail, and return its message on one line."""

    def check(*arguments: str, code: int) -> str:
        before = {path.name for path in tmp_path.iterdir()}
        assert run(arguments) == code
        captured = capsys.readouterr()
        assert captured.out == "" and "Traceback" not in captured.err
        assert {path.name for path in tmp_path.iterdir()} == before, "something was written"
        return " ".join(captured.err.split())

    return check


def test_groups_that_cannot_be(refused: Callable[..., str], save_tiny: Save) -> None:
    save_tiny("llama", name="llama")
    text = refused("convert", "demo", "--to", "gqa", "--groups", "5", code=2)
    assert "--groups 5 does not divide demo's 8 attention heads. Use 1, 2, 4 or 8." in text
    assert "--groups 16 is more than demo's 8 attention heads" in refused("convert", "demo", "--groups", "16", code=2)
    assert "not a positive number" in refused("convert", "demo", "--groups", "0", code=2)
    assert "contradicts" in refused("convert", "demo", "--to", "mqa", "--groups", "2", code=2)
    assert "Did you mean 'gqa'?" in refused("convert", "demo", "--to", "gqaa", code=2)
    assert "Did you mean 'mean'?" in refused("convert", "demo", "--method", "meen", code=2)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "bert"}, "encoder-only"),
        ({"model_type": "lama"}, "Did you mean 'llama'? CONTRIBUTING.md says how to add one."),
        ({}, "model_type None"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "cross-attention"),
        ({"model_type": "llama", "num_attention_heads": "32"}, "num_attention_heads '32', not a positive"),
        ({"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 5}, "don't divide"),
    ],
)
def test_models_that_cannot_be_converted(
    config: dict[str, object], says: str, refused: Callable[..., str], save_tiny: Save
) -> None:
    folder = save_tiny("llama", name="m")
    (folder / "config.json").write_text(json.dumps(config))
    assert says in refused("convert", "m", code=1 if "num_attention_heads" in config else 2)
    assert says in refused("inspect", "m", code=1 if "num_attention_heads" in config else 2)


def test_folders_that_are_no_checkpoint(refused: Callable[..., str], save_tiny: Save, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused("convert", "empty", code=1)
    assert "There is no folder ./nowhere" in refused("convert", "./nowhere", code=2)
    folder = save_tiny("llama", name="cut")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    assert "cut/model.safetensors is cut short" in refused("convert", "cut", code=1)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "--allow-pickle" in refused("convert", "cut", code=1)


def test_out_that_cannot_be(refused: Callable[..., str], save_tiny: Save, tmp_path: Path) -> None:
    save_tiny("llama", name="m")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("")
    assert "add --overwrite" in refused("convert", "m", "there", code=2)
    assert "lies inside the source" in refused("convert", "m", "m/out", code=2)
    assert "contains the source" in refused("convert", "m", ".", "--overwrite", code=2)
    (tmp_path / "file").write_text("")
    assert "not a folder" in refused("convert", "m", "file", "--overwrite", code=2)


def test_an_unreachable_hub_names_the_host_and_the_way_out(tmp_path: Path) -> None:
    """In a process of its own: the endpoint is read when huggingface_hub is imported."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-m", "uptrain", "inspect", "org/model"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    text = " ".join(done.stderr.split())
    assert done.returncode == 1 and "Traceback" not in text
    assert "the Hub at 127.0.0.1:9 can't be reached" in text and "local folder" in text


def test_verify_exits_3_on_one_flipped_byte(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["convert", "demo", "--to", "mqa"]) == 0
    assert run(["verify", "demo-mqa"]) == 0
    path = tmp_path / "demo-mqa" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    assert run(["verify", "demo-mqa"]) == 3
    assert "checksum" in " ".join(capsys.readouterr().err.split())


def test_dry_run_writes_nothing_and_says_what_it_would(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["convert", "demo", "--groups", "2", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["out"] == "demo-gqa2" and list(tmp_path.iterdir()) == []
    assert plan["num_key_value_heads"] == {"before": 8, "after": 2} and plan["remote_code"] is True
    assert run(["convert", "demo", "--groups", "2", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert {key: done[key] for key in ("digest", "shards", "total_bytes")} == {
        key: plan[key] for key in ("digest", "shards", "total_bytes")
    }


def test_a_dry_run_that_is_to_diagnose_is_refused(refused: Callable[..., str]) -> None:
    text = refused("convert", "demo", "--groups", "2", "--dry-run", "--diagnose", code=2)
    assert "--diagnose" in text and "--dry-run" in text


@pytest.mark.parametrize("name", ["text", "json"])
@pytest.mark.parametrize(
    "command", [["eval", "demo", "--no-speed", "--text"], ["convert", "demo", "out", "--to", "mqa", "--calibrate"]]
)
def test_the_name_of_a_file_format_is_no_text(
    name: str, command: list[str], refused: Callable[..., str], tmp_path: Path
) -> None:
    """`datasets` would read every such file of the current folder."""
    (tmp_path / "mine.txt").write_text("my own text " * 2000)
    (tmp_path / "mine.json").write_text(json.dumps([{"text": "my own text " * 2000}]))
    assert f"{command[-1]} {name} is not a text" in refused(*command, name, code=2)


@pytest.mark.parametrize(("method", "negative"), [("svd", True), ("mean", False)])
def test_an_energy_below_zero_is_explained(method: str, negative: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """With svd the table compares the method first, which adds more error than it explains."""
    assert run(["convert", "demo", "out", "--to", "mqa", "--method", method, "--diagnose"]) == 0
    shown = capsys.readouterr()
    assert ("%" in shown.out, "-" in shown.out.partition("Wrote")[0]) == (True, negative)
    assert ("Below 0 %" in shown.err) is negative


def test_inspect_json_is_what_the_config_class_says(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoConfig

    from uptrain.checkpoint.source import DEMO

    assert run(["inspect", "demo", "--json"]) == 0
    found, config = json.loads(capsys.readouterr().out), AutoConfig.from_pretrained(DEMO)
    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        assert found[key] == getattr(config, key)
    assert found["cache_bytes_per_token"] == 2 * config.n_layer * config.n_embd * 2
    assert found["cache_bytes"]["4096"] == 4096 * found["cache_bytes_per_token"]
    targets = {(option["target"], option["num_key_value_heads"]): option["host"] for option in found["options"]}
    shared = {("gqa", 4): "uptrain_gpt2", ("gqa", 2): "uptrain_gpt2", ("mqa", 1): "gpt_bigcode"}
    assert targets == {**shared, ("mla", 8): "uptrain_gpt2_mla"}
    assert [option["cache"] for option in found["options"] if option["target"] == "mla"] == [0.5, 0.25]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["convert", "--help"],
        ["train", "--help"],
        ["push", "--help"],
        ["inspect", "demo"],
        ["recipes", "list"],
    ],
)
def test_quick_commands_import_neither_torch_nor_transformers(arguments: list[str]) -> None:
    script = (
        "import sys; from uptrain.cli.app import run; code = run(sys.argv[1:])\n"
        "assert code == 0 and not {'torch', 'transformers'} & set(sys.modules), code"
    )
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, stdout=subprocess.DEVNULL)


def test_conversion_itself_needs_no_torch(tmp_path: Path) -> None:
    """A machine that only converts need not install it."""
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from uptrain.cli.app import run; sys.exit(run(['convert', 'demo', '--to', 'mqa']))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert (tmp_path / "demo-mqa" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2 * 2**30), ("1024B", 1024), ("3 b", 3), ("1.5k", 1500)],
)
def test_sizes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size
    assert run(["convert", "demo", "--max-shard-size", "five"]) == 2


def test_code_in_brackets_is_printed_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.facts("[bold]", [("[i]", "x[red] = [/] y")])
    console.table("", ["name"], [["a[b]"]])
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("[bold]", "[i]", "x[red] = [/] y", "a[b]"))


def test_a_value_between_colons_is_printed_and_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "demo", "--calibrate", "text.txt:-1"]) == 2
    assert "text.txt:-1: " in capsys.readouterr().err


def test_an_empty_value_is_refused_by_the_name_of_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "demo", "--calibrate", ""]) == 2
    assert "empty text" in capsys.readouterr().err
    assert run(["convert", "demo", "--calibrate", "text.txt", "--quality", ""]) == 2
    assert "--quality" in capsys.readouterr().err


def test_the_time_left_begins_again_with_another_calibration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 200.0, 230.0, 300.0, 310.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    show = console.layer_progress()
    for done in (0, 1, 0, 1):
        show(done, 4)
    first, second = capsys.readouterr().err.splitlines()
    assert "layer 1 of 4, 1:30 left" in first and "layer 1 of 4, 0:30 left" in second


def test_the_time_left_counts_no_layer_that_an_earlier_run_calibrated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 110.0, 140.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    show = console.layer_progress()
    show(5, 8)
    show(6, 8)
    told = capsys.readouterr().err
    assert "layer 5 of 8, 0:30 left" in told and "layer 6 of 8, 0:40 left" in told
