"""Lay out what a verification found and what was signed; printing itself is the console's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uptrain.checkpoint.manifest import SIGNATURE
from uptrain.cli import console

if TYPE_CHECKING:
    from uptrain.checkpoint.signature import Signer


def verification(directory: Path, manifest: dict[str, Any], signer: Signer | None, as_json: bool) -> None:
    """Show that a folder matches its manifest, and whose signature it bears."""
    if as_json:
        result = {"directory": str(directory), "files": len(manifest["files"]), "ok": True}
        console.result_json({**result, "signer": signer and asdict(signer)})
        return
    stages = " → ".join(str(stage.get("stage")) for stage in manifest["stages"])
    console.result(f"{directory}: all {len(manifest['files'])} files match uptrain.json (history: {stages}).")
    if signer is not None and signer.identity:
        console.result(f"Signed by {signer.identity} with {signer.key}.")
    elif signer is not None:
        console.note(f"Signed with {signer.key}; --allowed-signers FILE asks whose that is.")


def signed(directory: Path, signer: Signer, as_json: bool) -> None:
    """Show what was signed, and with which key."""
    if as_json:
        console.result_json({"signature": str(directory / SIGNATURE), **asdict(signer)})
        return
    console.result(f"Signed {directory} with {signer.key}: {directory / SIGNATURE}")
