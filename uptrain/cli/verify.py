"""`uptrain verify`: its options, its call and what it prints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uptrain.cli import console
from uptrain.cli.options import examples, json_option
from uptrain.errors import UsageError

if TYPE_CHECKING:
    from uptrain.checkpoint.signature import Signer


@click.command(
    epilog=examples("uptrain verify demo-gqa4", "uptrain verify demo-gqa4 --allowed-signers allowed_signers")
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--allowed-signers",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Require a signature by somebody in FILE, in the format of ssh-keygen(1).",
)
@click.option(
    "--identity", metavar="NAME", help="(--allowed-signers) Name in FILE that must have signed. Default: any."
)
@json_option
def verify(directory: Path, allowed_signers: Path | None, identity: str | None, as_json: bool) -> None:
    """Compare every file of DIRECTORY with the checksums in its uptrain.json.

    A signature of uptrain.json must match it. --allowed-signers also checks who signed.

    Exits with 0 if everything matches, and with 3 if something does not.
    """
    from uptrain.checkpoint import manifest, signature

    signer = None
    if allowed_signers is not None:
        signer = signature.verify_signed(directory, allowed_signers, identity)
    elif identity is not None:
        raise UsageError("--identity requires --allowed-signers.", "Add --allowed-signers FILE.")
    elif signature.is_signed(directory) and signature.can_check():
        signer = signature.signed_by(directory)
    elif signature.is_signed(directory):
        console.note("The signature is not checked: ssh-keygen is not installed.")
    _show(directory, manifest.verify(directory), signer, as_json)


def _show(directory: Path, manifest: dict[str, Any], signer: Signer | None, as_json: bool) -> None:
    """Print that a folder matches its manifest, and who signed it."""
    if as_json:
        result = {"directory": str(directory), "files": len(manifest["files"]), "ok": True}
        console.result_json({**result, "signer": signer and asdict(signer)})
        return
    stages = " → ".join(str(stage.get("stage")) for stage in manifest["stages"])
    console.result(f"{directory}: all {len(manifest['files'])} files match uptrain.json (history: {stages}).")
    if signer is not None and signer.identity:
        console.result(f"Signed by {signer.identity} with {signer.key}.")
    elif signer is not None:
        console.note(f"Signed with {signer.key}. --allowed-signers FILE checks whose key that is.")
