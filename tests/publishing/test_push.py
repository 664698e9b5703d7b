"""Publishing through the real client to a loopback Hub: what arrives, what is refused, and what is never sent."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.corpus import checkpoint
from tests.hub_push_server import TOKEN, Hub, front_matter, serve_hub
from uptrain.checkpoint.manifest import append_stage, verify
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert

Run = Callable[..., subprocess.CompletedProcess[str]]
SOURCE_CARD = "---\nlicense: mit\n---\n# Source\n"


@pytest.fixture
def hub() -> Iterator[tuple[str, Hub]]:
    with serve_hub() as served:
        yield served


@pytest.fixture
def environment(hub: tuple[str, Hub], tmp_path: Path) -> dict[str, str]:
    here = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    return {
        **here,
        "HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Run:
    def call(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "uptrain", *arguments],
            env={**environment, **changes}, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return call


@pytest.fixture
def refused(hub: tuple[str, Hub], run: Run) -> Callable[..., str]:
    """Push what must be refused; nothing may be uploaded, and the token may not be shown."""

    def check(*arguments: str, code: int, **changes: str) -> str:
        before = {name: dict(repository.branches) for name, repository in hub[1].repositories.items()}
        done = run("push", *arguments, **changes)
        assert done.returncode == code, done.stderr
        assert done.stdout == "" and "Traceback" not in done.stderr
        token = changes.get("HF_TOKEN", TOKEN)
        assert not token or token not in done.stderr
        after = {name: dict(repository.branches) for name, repository in hub[1].repositories.items()}
        assert after == before and hub[1].objects == {}, "something was uploaded"
        return " ".join(done.stderr.split())

    return check


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert("demo", tmp_path_factory.mktemp("push") / "demo-gqa4", Request("gqa", 4)).out


@pytest.fixture
def demo(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "demo-gqa4"))


def python(code: str, environment: dict[str, str], cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, cwd=cwd, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_hub_to_hub_and_back(hub: tuple[str, Hub], run: Run, environment: dict[str, str], tmp_path: Path) -> None:
    """Converted by id, pushed, loaded by stock classes with the same logits, and converted again by id."""
    source = checkpoint(tmp_path / "source", "llama")
    (source / "README.md").write_text(SOURCE_CARD)
    hub[1].add("org/tiny", {path.name: path.read_bytes() for path in source.iterdir()})
    assert run("convert", "org/tiny", "half", "--groups", "2").returncode == 0
    done = run("push", "half", "me/half", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["commit"] == hub[1].repositories["me/half"].branches["main"]
    sent = hub[1].files("me/half")
    for name in result["files"]:
        assert name == "README.md" or sent[name] == (tmp_path / "half" / name).read_bytes()
    card = front_matter(sent["README.md"].decode())
    found = {key: card[key] for key in ("base_model", "base_model_relation", "license", "library_name")}
    assert found == {
        "base_model": "org/tiny", "base_model_relation": "finetune", "license": "mit", "library_name": "transformers",
    }  # fmt: skip

    logits = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "for name in ('me/half', './half'):\n"
        "    model = AutoModelForCausalLM.from_pretrained(name).eval()\n"
        "    ids = AutoTokenizer.from_pretrained(name)('the quick brown', return_tensors='pt')['input_ids']\n"
        "    print(ids.tolist(), model(ids).logits.double().sum().item(), model.config.num_key_value_heads)"
    )
    there, here = python(logits, environment, tmp_path).splitlines()
    assert there == here and there.endswith(" 2")

    assert run("convert", "me/half", "one", "--to", "mqa").returncode == 0
    stages = json.loads((tmp_path / "one" / "uptrain.json").read_text())["stages"]
    assert [stage["source"]["name"] for stage in stages] == ["org/tiny", "me/half"]
    shown = run("push", "one", "me/one", "--dry-run", "--json")
    again = front_matter(json.loads(shown.stdout)["card"])
    assert (again["base_model"], again["license"]) == ("me/half", "mit")


@pytest.mark.slow
def test_what_arrives_verifies_and_the_card_s_own_words_load_it(
    hub: tuple[str, Hub], run: Run, environment: dict[str, str], demo: Path, tmp_path: Path
) -> None:
    assert run("push", "demo-gqa4", "me/demo-gqa4").returncode == 0
    (tmp_path / "copy").mkdir()
    for name, data in hub[1].files("me/demo-gqa4").items():
        (tmp_path / "copy" / name).write_bytes(data)
    assert verify(tmp_path / "copy")["stages"][-1]["stage"] == "convert"
    text = hub[1].files("me/demo-gqa4")["README.md"].decode()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    # Without our package: the class comes from the repository itself.
    assert "trust_remote_code=True" in snippet
    blocked = "import sys; sys.modules['uptrain'] = None\n"
    assert python(blocked + snippet, environment, tmp_path).startswith("The")


@pytest.mark.slow
def test_a_dry_run_shows_card_and_files_and_sends_nothing(hub: tuple[str, Hub], run: Run, demo: Path) -> None:
    (demo / "notes.txt").write_text("mine")
    done = run("push", "demo-gqa4", "me/demo", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("---\n") and "# demo" in done.stdout and "model.safetensors" in done.stdout
    assert "notes.txt" not in done.stdout and "notes.txt" in done.stderr
    assert hub[1].writes() == [] and not (demo / "README.md").exists()
    assert run("push", "demo-gqa4", "me/demo", "--dry-run", HF_HUB_OFFLINE="1").stdout == done.stdout


@pytest.mark.slow
def test_what_the_history_names_is_asked_about_and_said(hub: tuple[str, Hub], run: Run, demo: Path) -> None:
    manifest = json.loads((demo / "uptrain.json").read_text())
    source = {"name": "org/base", "origin": "hub", "revision": "c0ffee", "files": {}}
    stage = {**manifest["stages"][-1], "source": source}
    trained = {"stage": "train", "recipe": {"output": "/home/me/run"}, "source": "half", "steps": 1, "tokens": 2}
    (demo / "uptrain.json").write_text(json.dumps({**manifest, "stages": [stage, trained]}))
    done = run("push", "demo-gqa4", "me/demo", "--dry-run", "--license", "mit")
    notes = " ".join(done.stderr.split())
    assert "org/base, which this was made from, is not on the Hub" in notes
    assert "paths of this machine" in notes and "/home/me/run" in notes
    done = run("push", "demo-gqa4", "me/demo", "--dry-run", "--license", "mit", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and "HF_HUB_OFFLINE" in done.stderr
    hub[1].add("org/base", {"README.md": SOURCE_CARD.encode()})
    done = run("push", "demo-gqa4", "me/demo")
    assert done.returncode == 0, done.stderr
    text = hub[1].files("me/demo")["README.md"].decode()
    assert front_matter(text).items() >= {"base_model": "org/base", "license": "mit"}.items()
    assert "uptrain convert org/base ./demo-step1 --to gqa --groups 4 --method mean --revision c0ffee" in text


@pytest.mark.slow
def test_a_damaged_folder_is_refused(refused: Callable[..., str], demo: Path) -> None:
    path = demo / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "model.safetensors does not match its checksum" in refused("demo-gqa4", "me/demo", code=3)
    path.write_bytes(whole)
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].flat[0] = np.nan
    save_file(tensors, path)
    append_stage(demo, demo, {"stage": "edit"})
    assert f"NaN or infinity in tensor {name}" in refused("demo-gqa4", "me/demo", "--dry-run", code=1)
    path.write_bytes(whole)
    (demo / "tokenizer.json").unlink()
    append_stage(demo, demo, {"stage": "edit"})
    assert "has no tokenizer" in refused("demo-gqa4", "me/demo", code=1)
    manifest = json.loads((demo / "uptrain.json").read_text())
    del manifest["stages"][1]["request"]
    (demo / "uptrain.json").write_text(json.dumps(manifest))
    assert "uptrain.json has a history with parts missing" in refused("demo-gqa4", "me/demo", code=1)


@pytest.mark.slow
def test_terms_that_are_missing_or_closed_are_refused(
    hub: tuple[str, Hub], refused: Callable[..., str], run: Run, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "source", "llama")
    convert(str(source), tmp_path / "local", Request("mqa"))
    assert "licence of local" in refused("local", "me/local", code=2)
    assert "--base-model org/no is not on the Hub" in refused("local", "me/x", "--base-model", "org/no", code=2)
    hub[1].add("org/closed", {"README.md": SOURCE_CARD.encode()}, gated=True)
    says = refused("local", "me/local", "--base-model", "org/closed", code=2)
    assert "org/closed, which this was made from, is gated" in says and "--allow-gated-base" in says
    options = ("--base-model", "org/closed", "--allow-gated-base", "--json")
    done = run("push", "local", "me/local", *options)
    assert done.returncode == 0, done.stderr
    card = front_matter(hub[1].files("me/local")["README.md"].decode())
    assert (card["base_model"], card["license"]) == ("org/closed", "mit")


@pytest.mark.slow
def test_tokens_and_rights(hub: tuple[str, Hub], refused: Callable[..., str], demo: Path) -> None:
    says = refused("demo-gqa4", "me/demo", code=1, HF_TOKEN="hf_wrong_and_secret")
    assert "does not accept the token" in says and "hf auth login" in says
    assert "wants a token, and there is none" in refused("demo-gqa4", "me/demo", code=1, HF_TOKEN="")
    assert "the token may not write there" in refused("demo-gqa4", "others/demo", code=1)
    assert "has no owner" in refused("demo-gqa4", "demo", code=2)
    assert "is not a Hub id" in refused("demo-gqa4", "me/de mo", code=2)
    hub[1].failures.append(("POST", "create", 403, f"no rights for Bearer {TOKEN}"))
    assert "no rights for Bearer ***" in refused("demo-gqa4", "me/demo", code=1)


@pytest.mark.slow
def test_a_server_that_fails_or_is_not_there(hub: tuple[str, Hub], refused: Callable[..., str], demo: Path) -> None:
    hub[1].failures.append(("POST", "create", 503, "down for repair"))
    says = refused("demo-gqa4", "me/demo", code=1)
    assert "failed with 503 (down for repair)" in says and "Run the same command again" in says
    says = refused("demo-gqa4", "me/demo", code=1, HF_ENDPOINT="http://127.0.0.1:9")
    assert "127.0.0.1:9 can't be reached" in says and "HF_ENDPOINT" in says


@pytest.mark.slow
def test_what_has_arrived_is_not_sent_twice(hub: tuple[str, Hub], run: Run, demo: Path) -> None:
    hub[1].failures.append(("POST", "/commit/", 500, ""))
    assert run("push", "demo-gqa4", "me/demo").returncode == 1
    assert list(hub[1].files("me/demo")) == [".gitattributes"], "a repository appears whole or not at all"
    sent = [path for method, path in hub[1].requests if method == "PUT"]
    assert len(sent) == 1
    hub[1].failures.clear()
    for _ in range(2):
        done = run("push", "demo-gqa4", "me/demo")
        assert done.returncode == 0, done.stderr
    assert [path for method, path in hub[1].requests if method == "PUT"] == sent
    assert len(hub[1].repositories["me/demo"].commits) == 2, "pushing the same again makes no commit"


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(hub: tuple[str, Hub], environment: dict[str, str], demo: Path) -> None:
    hub[1].storage_open.clear()
    running = subprocess.Popen(
        [sys.executable, "-m", "uptrain", "push", "demo-gqa4", "me/demo"],
        env=environment, cwd=demo.parent, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not any(method == "PUT" for method, _ in hub[1].requests) and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=30)
    hub[1].storage_open.set()
    assert running.returncode == 130 and "Run the same command again" in said and "Traceback" not in said
    assert list(hub[1].files("me/demo")) == [".gitattributes"]


def test_the_same_from_python(hub: tuple[str, Hub], environment: dict[str, str], demo: Path) -> None:
    code = "import uptrain; print(uptrain.push('demo-gqa4', 'me/demo', private=True).commit)"
    said = python(code, environment, demo.parent)
    assert said.strip() == hub[1].repositories["me/demo"].branches["main"] and hub[1].repositories["me/demo"].private


@pytest.mark.slow
def test_a_dry_run_from_python_uploads_nothing(hub: tuple[str, Hub], environment: dict[str, str], demo: Path) -> None:
    code = (
        "import uptrain; would = uptrain.push('demo-gqa4', 'me/demo', dry_run=True); print(*sorted(would.files))\n"
        "assert '# demo' in would.card"
    )
    would = python(code, environment, demo.parent).split()
    assert hub[1].repositories == {} and hub[1].objects == {}
    assert python("import uptrain; uptrain.push('demo-gqa4', 'me/demo')", environment, demo.parent) == ""
    assert set(would) == set(hub[1].files("me/demo")) - {".gitattributes"}


@pytest.mark.slow
def test_looking_needs_no_torch(environment: dict[str, str], demo: Path) -> None:
    script = (
        "import sys; from uptrain.cli.app import run; code = run(['push', 'demo-gqa4', 'me/demo', '--dry-run'])\n"
        "assert code == 0 and not {'torch', 'transformers'} & set(sys.modules), code"
    )
    python(script, environment, demo.parent)


@pytest.mark.slow
def test_private_stays_private(hub: tuple[str, Hub], run: Run, demo: Path) -> None:
    assert run("push", "demo-gqa4", "me/demo", "--private").returncode == 0
    assert hub[1].repositories["me/demo"].private
    hub[1].add("me/open", {"x": b""})
    done = run("push", "demo-gqa4", "me/open", "--private")
    assert done.returncode == 2 and "public" in " ".join(done.stderr.split())
    assert hub[1].files("me/open") == {"x": b""}


@pytest.mark.slow
def test_branches_and_pull_requests_leave_main_alone(hub: tuple[str, Hub], run: Run, demo: Path) -> None:
    hub[1].add("org/theirs", {"README.md": b"theirs"})
    done = run("push", "demo-gqa4", "org/theirs", "--create-pr", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pull_request"].endswith("/org/theirs/discussions/1")
    assert hub[1].files("org/theirs") == {"README.md": b"theirs"}
    assert "model.safetensors" in hub[1].files("org/theirs", "refs/pr/1")
    for _ in range(2):
        assert run("push", "demo-gqa4", "me/demo", "--revision", "v1").returncode == 0
    assert list(hub[1].files("me/demo")) == [".gitattributes"]
    assert 'revision="v1"' in hub[1].files("me/demo", "v1")["README.md"].decode()


@pytest.mark.slow
def test_weights_of_an_older_push_do_not_stay_beside_the_new(hub: tuple[str, Hub], run: Run, demo: Path) -> None:
    """transformers prefers model.safetensors to an index, so a left-over one would be loaded; an adapter on top."""
    hub[1].add("me/demo", {"uptrain.json.sig": b"of other weights", "adapter_config.json": b"{}"})
    done = run("push", "demo-gqa4", "me/demo", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["removed"] == ["adapter_config.json", "uptrain.json.sig"]
    convert("demo", demo.parent / "shards", Request("gqa", 2, max_shard_size=2_000_000))
    done = run("push", "shards", "me/demo", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["removed"] == ["model.safetensors"]
    assert "model.safetensors.index.json" in hub[1].files("me/demo")
    assert "model.safetensors" not in hub[1].files("me/demo")


@pytest.mark.slow
def test_the_author_s_own_readme_is_kept(hub: tuple[str, Hub], run: Run, demo: Path) -> None:
    (demo / "README.md").write_text("---\nlanguage: en\nlicense: mit\ntags: [mine]\n---\n# By hand\n\nRead me.\n")
    assert run("push", "demo-gqa4", "me/demo").returncode == 0
    text = hub[1].files("me/demo")["README.md"].decode()
    assert text.endswith("# By hand\n\nRead me.\n")
    found: dict[str, Any] = front_matter(text)
    assert (
        found.items()
        >= {"language": "en", "license": "mit", "tags": ["mine"], "pipeline_tag": "text-generation"}.items()
    )
