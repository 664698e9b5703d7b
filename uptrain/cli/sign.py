"""`uptrain sign`: its options, its call and what it prints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from uptrain.checkpoint.manifest import SIGNATURE
from uptrain.cli import console
from uptrain.cli.options import examples, json_option
from uptrain.formatting import typed

if TYPE_CHECKING:
    from uptrain.checkpoint.signature import Signer


@click.command(epilog=examples("uptrain sign demo-gqa4 --key ~/.ssh/id_ed25519"))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--key",
    required=True,
    type=click.Path(path_type=Path),
    help="Private OpenSSH key, e.g. ~/.ssh/id_ed25519, or the public key of one in ssh-agent or a security key.",
)
@json_option
def sign(directory: Path, key: Path, as_json: bool) -> None:
    """Sign DIRECTORY's uptrain.json, and so every file that it lists, with an SSH key.

    Checks every file first, then writes uptrain.json.sig. `ssh-keygen -Y verify -n uptrain` checks this signature
    without uptrain.
    """
    from uptrain.checkpoint import signature

    _show(directory, signature.sign(directory, key), as_json)
    console.note(f"Next: uptrain verify {typed(directory)} --allowed-signers FILE")


def _show(directory: Path, signer: Signer, as_json: bool) -> None:
    """Print what was signed, and with which key."""
    if as_json:
        console.result_json({"signature": str(directory / SIGNATURE), **asdict(signer)})
        return
    console.result(f"Signed {directory} with {signer.key}: {directory / SIGNATURE}")
