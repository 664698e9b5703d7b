"""A calibration that is killed or fails at any call to the disk goes on where it was, and ends with the same bytes."""

from __future__ import annotations

import errno
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny_config, tiny_model
from tests.faults.boundaries import At, Call, Killed, failing_at, killed_at, watched
from tests.faults.tally import KILLED, struck
from tests.small import digests
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.source import DEMO
from uptrain.conversion.calibration.layer_search import LayerSearch
from uptrain.conversion.calibration.store import NOTES
from uptrain.conversion.plan.planner import PLAN_FORMAT
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import Conversion, convert
from uptrain.conversion.run.options import RunOptions
from uptrain.errors import UptrainError

LAYERS = 3
FORMS = {"heads": {"target": "mqa"}, "latent": {"target": "mla", "cache": 0.5, "rope": "longrope"}}


@pytest.fixture(autouse=True)
def _in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uptrain.conversion.run.pipeline._workers", lambda: 1)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("uptrain.checkpoint.manifest.versions", dict)


class World:
    """A model of three layers, a text, and what an undisturbed calibration makes of them."""

    def __init__(self, root: Path, form: str) -> None:
        self.root, self.source, self.out = root, root / "src", root / "place" / "out"
        self.text, self.form = root / "text.txt", FORMS[form]
        sizes = {"num_hidden_layers": LAYERS, "max_position_embeddings": 128, "vocab_size": 4096}
        tiny_model(tiny_config("llama", **sizes)).save_pretrained(self.source)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / name, self.source)
        self.text.write_text(Path(shutil.__file__).read_text(encoding="utf-8")[:6000], encoding="utf-8")
        self.folder = self.out.with_name("out.uptrain-calibration")
        self.made = 0
        self.fresh()
        self.run()
        self.final = digests(self.out)

    def fresh(self) -> None:
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir()

    def run(self, memory: int = 2**40, **more: Any) -> Conversion:
        """Convert, counting the layers that are calibrated."""
        self.made, convert_layer = 0, LayerSearch.convert

        def counted(task: LayerSearch[Any]) -> Any:
            self.made += 1
            return convert_layer(task)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LayerSearch, "convert", counted)
            settings = {"calibrate": str(self.text), "calibration_tokens": 768, "repair_steps": 2}
            request = Request(**{**self.form, "method": "calibrated", "dtype": "float32", **settings})
            return convert(str(self.source), self.out, request, options=RunOptions(memory=memory), **more)

    def disturbed(self, at: At, expected: type[BaseException], memory: int = 2**40) -> None:
        self.fresh()
        with watched(self.root, at), pytest.raises(expected) as caught:
            self.run(memory)
        assert "\n" not in str(caught.value)
        assert not self.out.exists()

    def boundaries(self) -> list[tuple[int, Call]]:
        """Return the calls of a run that change something of the calibration's folder while it is made."""
        self.fresh()
        with watched(self.root) as seen:
            self.run()
        stood = next(i for i, call in enumerate(seen.calls) if call == Call("rename", "place/out.partial"))
        near = enumerate(seen.calls[:stood])
        return [(number, call) for number, call in near if call.changes and self.folder.name in call.name]

    def check_ends_well(self, layers: set[int], **more: Any) -> None:
        """The same command gives an undisturbed run's bytes after calibrating so many layers; nothing else is left."""
        self.run(**more)
        assert self.made in layers
        assert digests(self.out) == self.final
        assert [path.name for path in self.out.parent.iterdir()] == ["out"]


@pytest.fixture(params=FORMS)
def world(tmp_path: Path, request: pytest.FixtureRequest) -> World:
    return World(tmp_path, request.param)


@pytest.mark.slow
def test_killed_at_any_boundary(world: World) -> None:
    """A latent's files are written as those of heads are, so of its layers one will do."""
    boundaries = world.boundaries()
    kept = [number for number, call in boundaries if call.kind == "rename" and call.name.endswith(NOTES + ".tmp")]
    assert len(kept) == LAYERS
    for number, _ in boundaries if world.form is FORMS["heads"] else middle(boundaries):
        world.disturbed(killed_at(number), Killed)
        world.check_ends_well({LAYERS - sum(done < number for done in kept)})


def middle(boundaries: list[tuple[int, Call]]) -> list[tuple[int, Call]]:
    """Return those of the middle layer, more or less."""
    third = len(boundaries) // 3
    return boundaries[third : 2 * third + 1]


@pytest.mark.slow
def test_a_full_disk_while_a_layer_is_kept(tmp_path: Path) -> None:
    world = World(tmp_path, "heads")
    for number, _ in middle(world.boundaries()):
        world.disturbed(failing_at(number, errno.ENOSPC), UptrainError)
        world.check_ends_well(set(range(LAYERS + 1)))


def cut_off(world: World, layers: int, memory: int = 2**40) -> None:
    """Leave a run that was killed when it had calibrated `layers` layers."""
    notes = [n for n, call in world.boundaries() if call == Call("rename", f"place/{world.folder.name}/{NOTES}.tmp")]
    world.disturbed(killed_at(notes[layers - 1] + 1), Killed, memory)


@pytest.mark.slow
def test_what_a_killed_run_left_is_used_and_cleared(world: World) -> None:
    """Its activations lie in files, whose order of calls is another; the next run has memory for them."""
    made = 0

    def stop(done: int, layers: int) -> None:
        nonlocal made
        made += 1
        if made == 2:
            leftover = world.folder / ".activations-killed"
            leftover.mkdir()
            (leftover / "original").write_bytes(b"\0" * 100)
            struck(KILLED)
            raise Killed

    world.fresh()
    with pytest.raises(Killed):
        world.run(memory=1, events=Events(layer=stop))
    notes: list[str] = []
    world.check_ends_well({LAYERS - 2}, events=Events(note=notes.append))
    assert notes[:1] == [f"Going on after 2 of {LAYERS} layers, which an earlier run calibrated."]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "gone", "notes gone", "notes cut", "notes of another form"])
def test_damaged_layers_are_made_again(damage: str, world: World) -> None:
    cut_off(world, 2)
    notes = world.folder / NOTES
    if damage == "notes gone":
        notes.unlink()
    elif damage == "notes cut":
        notes.write_bytes(notes.read_bytes()[:-9])
    elif damage == "notes of another form":
        notes.write_text('{"plan": [], "files": {"layer-0.npz": 1}}')
    elif damage == "gone":
        (world.folder / "layer-1.npz").unlink()
    else:
        whole = (world.folder / "layer-1.npz").read_bytes()
        (world.folder / "layer-1.npz").write_bytes(whole[:-9])
    world.check_ends_well({LAYERS if "notes" in damage else LAYERS - 1})


@pytest.mark.slow
def test_layers_of_an_older_plan_format_are_made_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("uptrain.conversion.plan.planner.PLAN_FORMAT", PLAN_FORMAT - 1)
        cut_off(world, 2)
    assert (world.folder / "layer-1.npz").is_file()
    world.check_ends_well({LAYERS})


@pytest.mark.slow
def test_another_text_starts_over(world: World) -> None:
    cut_off(world, 2)
    old = world.text.read_text(encoding="utf-8")
    world.text.write_text(old[::-1], encoding="utf-8")
    notes: list[str] = []
    world.run(events=Events(note=notes.append))
    assert world.made == LAYERS and "The calibration text changed" in notes[0]
    shutil.rmtree(world.out)
    world.text.write_text(old, encoding="utf-8")
    world.check_ends_well({LAYERS})


@pytest.mark.slow
def test_a_folder_of_a_similar_name_is_left_alone(world: World) -> None:
    world.fresh()
    mine = world.out.with_name("out.calibration")
    mine.mkdir()
    (mine / "corpus.txt").write_text("years of work")
    world.run()
    assert (mine / "corpus.txt").read_text() == "years of work"
    assert import_module("uptrain.conversion.run.job").calibration_folder(world.out) != mine
