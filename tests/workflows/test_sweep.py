"""A sweep is what its commands give one by one, finishes what was cut off, and marks what nothing beats."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.corpus import checkpoint, corpus
from tests.evaluation.test_eval_file import keys_of
from tests.publishing.test_report_page import Document
from uptrain.checkpoint.events import Events
from uptrain.cli.app import run
from uptrain.conversion.calibration.layer_runner import LayerOnBlock
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.data.sources import Files
from uptrain.evaluation import EvaluationSettings, evaluate
from uptrain.evaluation.sweep_results import pareto
from uptrain.workflows import SweepSettings, sweep
from uptrain.workflows.sweeps import trials
from uptrain.workflows.sweeps.targets import parse_target

BUILD = import_module("uptrain.conversion.run.build")
DOCS = Path(__file__).parents[2] / "docs/sweep.md"
TARGETS = {"gqa:2": Request("gqa", 2, "mean"), "mla:24": Request("mla", kv_lora_rank=24)}
CALIBRATION = {"calibration_tokens": 256, "repair_steps": 2}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    checkpoint(folder / "source")
    corpus(folder / "text.txt", 60)
    corpus(folder / "calibration.txt", 60, seed=1)
    return folder


def command(here: Path, out: str, *more: str) -> list[str]:
    calibrating = "--methods" not in more or "calibrated" in more[more.index("--methods") + 1]
    words = ["--calibrate", str(here / "calibration.txt"), "--calibration-tokens", "256", "--repair-steps", "2"]
    return [
        "sweep", str(here / "source"), "--to", ",".join(TARGETS), "--out", str(here / out),
        *(words if calibrating else []),
        "--text", str(here / "text.txt"), "--context", "32", "--tokens", "300", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(here: Path) -> dict[str, Any]:
    assert run(command(here, "done")) == 0
    return read(here / "done")


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return found


def plain(found: dict[str, Any]) -> dict[str, Any]:
    """Return a sweep without what differs from one run to the next."""
    trials = [{key: each[key] for key in each if not key.endswith("_seconds")} for each in found["arms"]]
    return {**found, "arms": trials}


def test_each_checkpoint_is_what_convert_writes(here: Path, done: dict[str, Any], tmp_path: Path) -> None:
    for trial in done["arms"]:
        options = {**vars(TARGETS[trial["target"]]), "method": trial["method"]}
        if trial["method"] == "calibrated":
            options |= {**CALIBRATION, "calibrate": str(here / "calibration.txt")}
        alone = convert(str(here / "source"), tmp_path / trial["name"], Request(**options))
        files = [path.name for path in alone.out.iterdir() if path.name != "uptrain.json"]
        assert "model.safetensors" in files
        for name in files:
            assert (here / "done" / trial["name"] / name).read_bytes() == (alone.out / name).read_bytes(), name
    assert len(done["arms"]) == 5


def test_each_metric_is_what_eval_says(here: Path, done: dict[str, Any]) -> None:
    text = [Files(files=str(here / "text.txt"))]
    settings = EvaluationSettings(text=text, context=32, tokens=300, repeats=0)
    for trial in done["arms"]:
        folder = here / "done" / trial["name"]
        alone = evaluate(str(folder), settings, baseline=str(here / "source"))
        assert alone.baseline is not None
        for name in ("perplexity_ratio", "kl", "top1_agreement", "top5_agreement", "flip_rate"):
            assert trial[name] == getattr(alone, name)
        assert tuple(trial["kl_interval"]) == alone.kl_interval
        assert trial["perplexity"] == alone.model.perplexity
        assert trial["cache_bytes_per_token"] == alone.model.cache_bytes_per_token
        assert trial["share"] == alone.model.cache_bytes_per_token / alone.baseline.cache_bytes_per_token
        written = json.loads((folder / "eval.json").read_text())
        assert written["kl"] == alone.kl and written["baseline"]["name"] == str(here / "source")
        assert done["original"]["perplexity"] == alone.baseline.perplexity


def test_what_cannot_be_is_named_and_stops_nothing(done: dict[str, Any]) -> None:
    (refused,) = done["refused"]
    assert (refused["target"], refused["method"]) == ("mla:24", "mean")
    assert refused["why"] == "--method mean makes fewer heads, not a latent."
    assert {(trial["target"], trial["method"]) for trial in done["arms"]} == {
        ("gqa:2", "mean"), ("gqa:2", "svd"), ("gqa:2", "calibrated"), ("mla:24", "svd"), ("mla:24", "calibrated"),
    }  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float)), max_size=12))
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    def beaten(one: tuple[float, float]) -> bool:
        return any(each[0] <= one[0] and each[1] <= one[1] and each != one for each in points)

    assert pareto(points) == [not beaten(point) for point in points]


def test_trials_are_marked_and_sorted_by_cache(done: dict[str, Any]) -> None:
    trials = done["arms"]
    assert [trial["cache_bytes_per_token"] for trial in trials] == sorted(
        trial["cache_bytes_per_token"] for trial in trials
    )
    for trial in trials:
        others = [each for each in trials if each is not trial]
        beaten = [
            each for each in others
            if each["cache_bytes_per_token"] <= trial["cache_bytes_per_token"] and each["kl"] < trial["kl"]
        ]  # fmt: skip
        assert trial["pareto"] is (not beaten)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Count the conversions, and the blocks that the source's layers are run on."""
    counts = {"conversions": 0, "traces": 0}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(trials, "run_plan", counting("conversions", trials.run_plan))
    monkeypatch.setattr(LayerOnBlock, "trace", counting("traces", LayerOnBlock.trace))
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["before measuring", "while converting"])
def test_a_sweep_cut_off_ends_as_if_it_had_not_been(
    cut: str, here: Path, done: dict[str, Any], counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"cut {cut}"

    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    where = (trials, "evaluate") if cut == "before measuring" else (BUILD, "write_companions")
    with monkeypatch.context() as patch:
        assert run(command(here, out, "--methods", "mean")) == 0
        patch.setattr(*where, stop)
        assert run(command(here, out)) == 130
    assert [trial["name"] for trial in read(here / out)["arms"]] == ["gqa2-mean"]
    first = (here / out / "gqa2-mean/model.safetensors").stat().st_mtime_ns
    counted["conversions"] = 0
    assert run(command(here, out)) == 0
    # One was finished; one that was converted is not converted again.
    assert counted["conversions"] == (3 if cut == "before measuring" else 4)
    assert (here / out / "gqa2-mean/model.safetensors").stat().st_mtime_ns == first
    assert plain(read(here / out)) == plain(done)


@pytest.mark.slow
def test_the_source_runs_once_where_memory_holds_it(here: Path, counted: dict[str, int]) -> None:
    layers, blocks = 2, 256 // 64
    calibrated = ("--methods", "calibrated", "--keep", "none")
    assert run(command(here, "shared", *calibrated)) == 0
    assert counted["traces"] == layers * blocks
    counted["traces"] = 0
    assert run(command(here, "apart", *calibrated, "--memory", "1B")) == 0
    assert counted["traces"] == 2 * layers * blocks
    assert plain(read(here / "apart"))["arms"] == plain(read(here / "shared"))["arms"]


def test_each_calibration_reports_its_layers_from_the_first(here: Path) -> None:
    layers: list[tuple[int, int]] = []
    settings = SweepSettings(
        methods=["calibrated"], calibrate=str(here / "calibration.txt"), calibration_tokens=128, repair_steps=0,
        text=[Files(files=str(here / "text.txt"))], context=32, tokens=100, keep="none",
    )  # fmt: skip
    events = Events(layer=lambda done, total: layers.append((done, total)))
    sweep(str(here / "source"), list(TARGETS), settings, out=here / "reported", events=events)
    assert layers == [(done, 2) for _ in TARGETS for done in (0, 1, 2)]


@pytest.mark.slow
def test_only_what_is_to_stay_stays(here: Path) -> None:
    for keep, methods in (("best", "first,svd"), ("none", "first,svd")):
        assert run(command(here, keep, "--methods", methods, "--keep", keep)) == 0
        found = read(here / keep)
        folders = {path.name for path in (here / keep).iterdir() if path.is_dir()}
        assert folders == {trial["name"] for trial in found["arms"] if trial["kept"]}
        assert folders == {trial["name"] for trial in found["arms"] if trial["pareto"] and keep == "best"}
        before = (here / keep / "sweep.json").read_text()
        assert run(command(here, keep, "--methods", methods, "--keep", keep)) == 0
        assert (here / keep / "sweep.json").read_text() == before, "a finished sweep was run again"


def test_another_sweep_and_other_files_are_left_alone(
    here: Path, done: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert run(command(here, "done", *arguments)) == 2
        return " ".join(capsys.readouterr().err.split())

    reported = refused("--tokens", "200")
    assert "another sweep" in reported and "tokens: 300, not 200" in reported and "--overwrite" in reported
    assert "calibration tokens: 256, not 100" in refused("--calibration-tokens", "100")
    (tmp_path / "mine").write_text("")
    for more in ((), ("--overwrite",)):
        assert "exists already and holds no sweep" in refused("--out", str(tmp_path), *more)
    assert "Did you mean 'svd'?" in refused("--methods", "svdd")
    assert "--to mla:x is no size of mla" in refused("--to", "mla:x")
    assert "does not divide" in refused("--to", "gqa:3")
    assert "empty" in refused("--out", str(tmp_path / "new"), "--calibrate", str(tmp_path / "mine"))
    assert "lies inside the source" in refused("--out", str(here / "source/out"))
    assert not (here / "source/out").exists()
    assert read(here / "done") == done and [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_elsewhere_is_never_deleted(here: Path, done: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").mkdir()
    trials = [{**done["arms"][0], "name": "../mine"}]
    (tmp_path / "out/sweep.json").write_text(json.dumps({**done, "arms": trials}))
    assert run(command(here, "done", "--out", str(tmp_path / "out"), "--overwrite")) == 1
    assert (tmp_path / "mine").is_dir()


@pytest.mark.slow
def test_overwrite_replaces_the_sweep(here: Path) -> None:
    assert run(command(here, "again", "--methods", "first")) == 0
    assert run(command(here, "again", "--methods", "mean", "--tokens", "200", "--overwrite")) == 0
    assert [trial["name"] for trial in read(here / "again")["arms"]] == ["gqa2-mean"]
    assert [path.name for path in (here / "again").iterdir() if path.is_dir()] == ["gqa2-mean"]


@pytest.mark.parametrize(
    ("word", "options", "folder"),
    [
        ("gqa", {"target": "gqa"}, "gqa"),
        ("gqa:4", {"target": "gqa", "groups": 4}, "gqa4"),
        ("mqa", {"target": "mqa"}, "mqa"),
        ("mla:128", {"target": "mla", "kv_lora_rank": 128}, "mla128"),
        ("mla:96+32", {"target": "mla", "kv_lora_rank": 96, "qk_rope_head_dim": 32}, "mla96+32"),
        ("mla:12.5%", {"target": "mla", "cache": 0.125}, "mla12.5pct"),
    ],
)
def test_words_for_targets(word: str, options: dict[str, Any], folder: str) -> None:
    found = parse_target(word)
    assert (found.options, found.folder) == (options, folder)
    Request(**found.options)


def test_every_key_is_documented_and_the_other_way_round(done: dict[str, Any]) -> None:
    tables = DOCS.read_text().split("| key |")[1:]
    documented = [keys_of(table) for table in tables]
    assert documented == [set(done), set(done["arms"][0])]


@pytest.mark.slow
def test_the_page_shows_every_trial_and_why_others_are_not(here: Path, done: dict[str, Any], tmp_path: Path) -> None:
    assert run(["report", str(here / "done"), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    document = Document(text)
    assert document.tags["script"] == 0 and "http" not in text and str(here) not in text and document.tags["svg"] == 2
    *rows, original = document.tables[0][1:]
    assert original[:5] == [
        "source",
        "the original",
        "768 B",
        "100 %",
        f"{done['original']['perplexity']:.2f}",
    ]
    for row, trial in zip(rows, done["arms"], strict=True):
        assert row[:2] == [("● " if trial["pareto"] else "") + trial["target"], trial["method"]]
        assert row[4] == f"{trial['perplexity']:.2f}" and float(row[6].split("(")[0]) == pytest.approx(
            trial["kl"], rel=0.01
        )
    assert "mla:24 by mean: --method mean makes fewer heads" in document.words
    assert all(math.isfinite(trial["kl"]) for trial in done["arms"])
