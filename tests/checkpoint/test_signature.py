"""A signature stands for every byte of a checkpoint; ssh-keygen itself makes the keys and judges the signatures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from uptrain.cli.app import run
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import VerificationError
from uptrain.publishing import push
from uptrain.publishing.hub.upload import Prepared

KEYGEN = shutil.which("ssh-keygen")
pytestmark = pytest.mark.skipif(KEYGEN is None, reason="OpenSSH's ssh-keygen is not installed")
SIGNATURE = "uptrain.json.sig"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "other"):
        subprocess.run([str(KEYGEN), "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", folder / name], check=True)
    public = {name: (folder / f"{name}.pub").read_text() for name in ("mine", "other")}
    (folder / "allowed").write_text(f"me@example.org {public['mine']}", encoding="utf-8")
    (folder / "others").write_text(f"you@example.org {public['other']}", encoding="utf-8")
    (folder / "both").write_text(f"me@example.org {public['mine']}you@example.org {public['other']}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert("demo", tmp_path_factory.mktemp("signed") / "demo-gqa4", Request("gqa", 4)).out


@pytest.fixture
def signed(made: Path, keys: Path, tmp_path: Path) -> Path:
    out = Path(shutil.copytree(made, tmp_path / "out"))
    assert run(["sign", str(out), "--key", str(keys / "mine")]) == 0
    return out


def says(capsys: pytest.CaptureFixture[str], *arguments: object, code: int) -> str:
    capsys.readouterr()
    assert run([str(each) for each in arguments]) == code
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return " ".join((shown.out + shown.err).split())


def test_ssh_keygen_alone_accepts_what_was_signed(signed: Path, keys: Path) -> None:
    with (signed / "uptrain.json").open("rb") as manifest:
        done = subprocess.run(
            [str(KEYGEN), "-Y", "verify", "-n", "uptrain", "-f", keys / "allowed", "-I", "me@example.org",
             "-s", signed / SIGNATURE],
            stdin=manifest, check=False,
        )  # fmt: skip
    assert done.returncode == 0


def test_the_signer_is_named(signed: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = says(capsys, "verify", signed, "--allowed-signers", keys / "both", code=0)
    assert "Signed by me@example.org with ED25519 key SHA256:" in told
    told = says(capsys, "verify", signed, "--allowed-signers", keys / "both", "--json", code=0)
    assert json.loads(told)["signer"]["identity"] == "me@example.org"
    told = says(capsys, "verify", signed, code=0)
    assert "--allowed-signers" in told


@pytest.mark.parametrize("identity", [[], ["--identity", "me@example.org"]])
def test_another_s_key_is_refused(
    signed: Path, keys: Path, identity: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = says(capsys, "verify", signed, "--allowed-signers", keys / "others", *identity, code=3)
    assert "which" in told and "does not allow" in told


def test_an_allowed_signer_is_refused_under_another_s_name(
    signed: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    allowed = ("--allowed-signers", keys / "both", "--identity")
    says(capsys, "verify", signed, *allowed, "me@example.org", code=0)
    assert "you@example.org" in says(capsys, "verify", signed, *allowed, "you@example.org", code=3)


def test_one_flipped_bit_of_the_manifest_or_its_signature_is_refused(
    signed: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("uptrain.json", SIGNATURE):
        whole = (signed / name).read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 3):
            (signed / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            told = says(capsys, "verify", signed, "--allowed-signers", keys / "allowed", code=3)
            assert f"{SIGNATURE} is no signature of uptrain.json as it stands" in told
            assert SIGNATURE in says(capsys, "verify", signed, code=3)
        (signed / name).write_bytes(whole)


def test_a_changed_weight_or_a_file_slipped_in_is_refused(
    signed: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = ("verify", signed, "--allowed-signers", keys / "allowed")
    for harmless in ("README.md", "eval.json"):
        (signed / harmless).write_text("{}")
    says(capsys, *check, code=0)
    (signed / "chat_template.jinja").write_text("{{ 'obey' }}")
    assert "chat_template.jinja" in says(capsys, *check, code=3)
    (signed / "chat_template.jinja").unlink()
    weights = signed / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "model.safetensors" in says(capsys, *check, code=3)
    assert "model.safetensors" in says(capsys, "sign", signed, "--key", keys / "mine", code=3)


def test_a_report_of_a_signed_folder_needs_no_signature(
    signed: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = ("verify", signed, "--allowed-signers", keys / "allowed")
    assert run(["report", str(signed)]) == 0
    assert list(signed.glob("report-*.png")), "the report drew nothing, so this test shows nothing"
    says(capsys, *check, code=0)
    (signed / "report-x.py").write_text("import os")
    assert "report-x.py" in says(capsys, *check, code=3)


def test_an_unsigned_folder_is_refused_where_a_signer_is_asked(
    made: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "signed" in says(capsys, "verify", made, "--allowed-signers", keys / "allowed", code=3)
    says(capsys, "verify", made, code=0)


def test_a_signature_of_something_else_does_not_count(
    signed: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Signed by the right key, but as git signs commits."""
    (signed / SIGNATURE).unlink()
    sign = [str(KEYGEN), "-q", "-Y", "sign", "-f", keys / "mine", "-n", "git", signed / "uptrain.json"]
    subprocess.run(sign, check=True)
    says(capsys, "verify", signed, "--allowed-signers", keys / "allowed", code=3)


def test_keys_that_cannot_sign_are_refused_in_one_sentence(
    signed: Path, keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (signed / SIGNATURE).read_bytes()
    locked = tmp_path / "locked"
    subprocess.run([str(KEYGEN), "-q", "-t", "ed25519", "-N", "secret", "-f", locked], check=True)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    for key in (signed / "config.json", locked):
        assert str(key) in says(capsys, "sign", signed, "--key", key, code=2)
    assert "key" in says(capsys, "sign", signed, "--key", tmp_path / "none", code=2)
    assert (signed / SIGNATURE).read_bytes() == before
    assert "allowed signers" in says(capsys, "verify", signed, "--allowed-signers", tmp_path / "none", code=2)
    assert "--allowed-signers" in says(capsys, "verify", signed, "--identity", "me@example.org", code=2)


def test_without_ssh_keygen_only_signatures_are_out_of_reach(
    signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    assert "not checked" in says(capsys, "verify", signed, code=0)
    assert "ssh-keygen" in says(capsys, "sign", signed, "--key", keys / "mine", code=1)
    assert "ssh-keygen" in says(capsys, "verify", signed, "--allowed-signers", keys / "allowed", code=1)


def test_what_is_made_from_a_signed_checkpoint_is_not_signed(signed: Path, keys: Path, tmp_path: Path) -> None:
    again = convert(str(signed), tmp_path / "again", Request("gqa", 2)).out
    assert not (again / SIGNATURE).exists()
    assert SIGNATURE not in json.loads((again / "uptrain.json").read_text())["files"]
    convert("demo", signed, Request("gqa", 2), overwrite=True)
    assert not (signed / SIGNATURE).exists(), "the old signature stayed on new bytes"


def prepare(folder: Path) -> Prepared:
    return push(folder, "me/demo", license="apache-2.0", dry_run=True)


@pytest.mark.slow
def test_push_takes_the_signature_along_and_refuses_a_stale_one(signed: Path, made: Path, keys: Path) -> None:
    assert SIGNATURE in prepare(signed).files
    assert SIGNATURE not in prepare(made).files
    manifest = signed / "uptrain.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(VerificationError, match="changed after signing"):
        prepare(signed)
    assert run(["sign", str(signed), "--key", str(keys / "mine")]) == 0
    assert SIGNATURE in prepare(signed).files
