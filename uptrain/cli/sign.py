"""`uptrain sign`: its options, its call and what it prints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from uptrain.checkpoint.manifest import SIGNATURE
from uptrain.cli import console
from uptrain.cli.options import json_option
from uptrain.formatting import typed

if TYPE_CHECKING:
    from uptrain.checkpoint.signature import Signer


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--key",
    required=True,
    type=click.Path(path_type=Path),
    help="Private key of OpenSSH, e.g. ~/.ssh/id_ed25519, or a public one that ssh-agent or a security key holds.",
)
@json_option
def sign(directory: Path, key: Path, as_json: bool) -> None:
    """Sign DIRECTORY's uptrain.json, and so every file it lists, with an SSH key.

    Checks every file first, and writes uptrain.json.sig beside it. `ssh-keygen -Y verify -n uptrain` checks such a
    signature without uptrain.

    \b
    uptrain sign demo-gqa4 --key ~/.ssh/id_ed25519
    """
    from uptrain.checkpoint import signature

    _show(directory, signature.sign(directory, key), as_json)
    console.note(f"Next: uptrain verify {typed(directory)} --allowed-signers FILE")


def _show(directory: Path, signer: Signer, as_json: bool) -> None:
    """Show what was signed, and with which key."""
    if as_json:
        console.result_json({"signature": str(directory / SIGNATURE), **asdict(signer)})
        return
    console.result(f"Signed {directory} with {signer.key}: {directory / SIGNATURE}")
