"""The commands that prove a folder, and stand for it: options and help. Bodies import what they need when they run."""

from __future__ import annotations

from pathlib import Path

import click

from uptrain.cli import console
from uptrain.errors import UsageError
from uptrain.formatting import typed


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--allowed-signers",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also ask who signed it; must be one of FILE, in the format of ssh-keygen(1).",
)
@click.option("--identity", metavar="NAME", help="The name in that file that must have signed. Default: any.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def verify(directory: Path, allowed_signers: Path | None, identity: str | None, as_json: bool) -> None:
    """Check every file of DIRECTORY against the checksums in its uptrain.json.

    A signature of uptrain.json must match it; whose it is, is asked with --allowed-signers.
    Exits 0 when all match and 3 when one doesn't.

    \b
    uptrain verify demo-gqa4
    uptrain verify demo-gqa4 --allowed-signers allowed_signers
    """
    from uptrain.checkpoint import manifest, signature
    from uptrain.cli import verify_report

    signer = None
    if allowed_signers is not None:
        signer = signature.verify_signed(directory, allowed_signers, identity)
    elif identity is not None:
        raise UsageError("--identity needs --allowed-signers, which says whose key is whose.", "Add it.")
    elif signature.is_signed(directory) and signature.can_check():
        signer = signature.signed_by(directory)
    elif signature.is_signed(directory):
        console.note("Its signature is not checked: there is no ssh-keygen here.")
    verify_report.verification(directory, manifest.verify(directory), signer, as_json)


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--key",
    required=True,
    type=click.Path(path_type=Path),
    help="Private key of OpenSSH, e.g. ~/.ssh/id_ed25519, or a public one that ssh-agent or a security key holds.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def sign(directory: Path, key: Path, as_json: bool) -> None:
    """Sign DIRECTORY's uptrain.json, and so every file it lists, with an SSH key.

    Checks every file first, and writes uptrain.json.sig beside it. `ssh-keygen -Y verify -n uptrain` checks such a
    signature without uptrain.

    \b
    uptrain sign demo-gqa4 --key ~/.ssh/id_ed25519
    """
    from uptrain.checkpoint import signature
    from uptrain.cli import verify_report

    verify_report.signed(directory, signature.sign(directory, key), as_json)
    console.note(f"Next: uptrain verify {typed(directory)} --allowed-signers FILE")


COMMANDS: dict[str, click.Command] = {"verify": verify, "sign": sign}
"""What the command line adds, by the name it is typed under."""
