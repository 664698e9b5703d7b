"""Hub ids through the real client and a loopback server: headers alone for looking, everything for converting."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub_server import SHA, serve
from uptrain.checkpoint.checksum import checksum_file
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert

Save = Callable[..., Path]


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"], ids=["single", "sharded"])
def test_looking_downloads_headers_only_and_converting_gives_the_local_bytes(
    shard_size: str, save_tiny: Save, tmp_path: Path, uptrain_against: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    source = save_tiny("llama", max_shard_size=shard_size, vocab_size=8000)
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    with serve(source, "org/tiny") as (endpoint, log):
        looked = uptrain_against(endpoint, "inspect", "org/tiny", "--json")
        assert looked.returncode == 0, looked.stderr
        found = json.loads(looked.stdout)
        local = json.loads(uptrain_against(endpoint, "inspect", str(source), "--json").stdout)
        assert SHA in found.pop("origin")
        assert {key: found[key] for key in found if key != "name"} == {
            key: local[key] for key in local if key not in ("name", "origin")
        }

        planned = uptrain_against(endpoint, "convert", "org/tiny", "--groups", "2", "--dry-run", "--json")
        assert planned.returncode == 0, planned.stderr
        sent = sum(count for _, path, count in log if path.endswith(".safetensors"))
        assert sent < weights / 2, "looking downloaded weights"

        done = uptrain_against(endpoint, "convert", "org/tiny", "--groups", "2")
        assert done.returncode == 0, done.stderr
        assert "org/tiny" in done.stderr
    convert(str(source), tmp_path / "local", Request("gqa", 2))
    plan = json.loads(planned.stdout)
    for path in (tmp_path / "local").glob("*.safetensors"):
        assert checksum_file(path) == checksum_file(tmp_path / "tiny-gqa2" / path.name)
        assert path.name in plan["shards"]
    stage = json.loads((tmp_path / "tiny-gqa2" / "uptrain.json").read_text())["stages"][0]
    assert (stage["source"]["name"], stage["source"]["revision"]) == ("org/tiny", SHA)


def test_unknown_names_and_revisions_are_said(
    save_tiny: Save, uptrain_against: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    with serve(save_tiny("llama"), "org/tiny") as (endpoint, _):
        for arguments, says in (
            (("org/other",), "org/other"),
            (("org/tiny", "--revision", "nowhere"), "nowhere"),
        ):
            done = uptrain_against(endpoint, "inspect", *arguments)
            assert done.returncode == 1 and says in " ".join(done.stderr.split()), done.stderr
            assert "Traceback" not in done.stderr and "hf_dummy" not in done.stderr
