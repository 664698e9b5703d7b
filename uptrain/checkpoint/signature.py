"""uptrain.json.sig: the signature of a manifest and so of every file that it lists, made and checked by OpenSSH."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from uptrain.checkpoint.files import write_atomic
from uptrain.checkpoint.manifest import EVALUATION, MANIFEST, SIGNATURE, read_manifest, unlisted, verify
from uptrain.checkpoint.output_folder import friendly_errors
from uptrain.errors import CheckpointError, UptrainError, UsageError, VerificationError

NAMESPACE = "uptrain"
"""The namespace of ssh-keygen: a signature made for e-mail or git is not valid here."""
UNSIGNED = ("README.md", EVALUATION, ".gitattributes", "report.html", "report-*.png")
"""Files of a signed folder that need no signature: uptrain or the Hub writes them later, for people to read."""


@dataclass(frozen=True)
class Signer:
    """Who signed a manifest: the key's type and fingerprint, and the owner's name if it was looked up."""

    key: str
    identity: str | None = None


def sign(directory: Path, key: Path) -> Signer:
    """Sign the manifest of a folder with an OpenSSH private key, or a public key whose private half an agent holds.

    Every file is checked against the manifest first. An earlier signature is replaced.

    Raises:
        CheckpointError: no folder or manifest.
        VerificationError: a file does not match the manifest.
        UsageError: there is no such key, or ssh-keygen can't sign with it.
        UptrainError: ssh-keygen is not installed, or the signature can't be written.
    """
    key = key.expanduser()
    if not key.is_file() or not os.access(key, os.R_OK):
        raise UsageError(f"{key} is no key that can be read.", "Name a private key, such as ~/.ssh/id_ed25519.")
    _program()
    verify(directory)
    with tempfile.TemporaryDirectory() as folder, friendly_errors(directory):
        copy = Path(folder) / MANIFEST
        shutil.copyfile(directory / MANIFEST, copy)
        # ssh-keygen asks for the passphrase on standard error, which must then be the terminal.
        terminal = sys.stdin is not None and sys.stdin.isatty()
        done = subprocess.run(
            [_program(), "-q", "-Y", "sign", "-f", str(key), "-n", NAMESPACE, str(copy)],
            stdout=subprocess.DEVNULL, stderr=None if terminal else subprocess.PIPE, text=True, errors="replace",
            check=False,
        )  # fmt: skip
        made = copy.with_name(SIGNATURE)
        if done.returncode != 0 or not made.is_file():
            raise UsageError(
                f"ssh-keygen can't sign with {key}{_reason(done.stderr)}.",
                "It must be a private key of OpenSSH that only you can read, or a public one that your agent holds.",
            )
        write_atomic(directory / SIGNATURE, made.read_text(encoding="ascii"))
    return signed_by(directory)


def is_signed(directory: Path) -> bool:
    """Tell whether the manifest has a signature, valid or not."""
    return (directory / SIGNATURE).is_file()


def can_check() -> bool:
    """Tell whether signatures can be made and checked on this machine."""
    return shutil.which("ssh-keygen") is not None


def signed_by(directory: Path) -> Signer:
    """Return the key that signed the manifest, without looking up its owner.

    Raises:
        CheckpointError: no folder or manifest.
        VerificationError: no signature, or the manifest is not what was signed.
        UptrainError: no ssh-keygen.
    """
    if not (directory / MANIFEST).is_file():
        raise CheckpointError(f"{directory} has no {MANIFEST}.", "Only folders that uptrain wrote have one.")
    path = directory / SIGNATURE
    if not is_signed(directory):
        raise VerificationError(f"{directory} has no {SIGNATURE}: nobody signed it.", "Sign it with `uptrain sign`.")
    done = _ask(directory, "check-novalidate")
    if done.returncode != 0:
        raise VerificationError(
            f"{path} is no signature of {MANIFEST} as it stands{_reason(done.stderr)}.",
            f"One of them was changed after signing; where that was you, `uptrain sign {directory}` signs it again.",
        )
    return Signer(done.stdout.partition(" with ")[2].strip() or "unknown key")


def verify_signed(directory: Path, allowed_signers: Path, identity: str | None = None) -> Signer:
    """Check that a signer of the file `allowed_signers` signed the manifest; with `identity`, that this signer did.

    `verify` checks the files that the manifest lists. Files that it does not list are refused here, except UNSIGNED.

    Raises:
        CheckpointError: no folder or manifest.
        VerificationError: the signature is missing, of another manifest or by another signer, or a file isn't signed.
        UsageError: there is no file `allowed_signers`.
        UptrainError: no ssh-keygen.
    """
    if not allowed_signers.is_file() or not os.access(allowed_signers, os.R_OK):
        raise UsageError(
            f"{allowed_signers} is no file of allowed signers that can be read.",
            "Each of its lines is a name and a public key: me@example.org ssh-ed25519 AAAA…",
        )
    signer = signed_by(directory)
    if identity is None:
        names = _ask(directory, "find-principals", "-f", str(allowed_signers)).stdout.splitlines()
    else:
        names = [identity]
    for name in names:
        if _ask(directory, "verify", "-f", str(allowed_signers), "-I", name).returncode == 0:
            break
    else:
        raise VerificationError(
            f"{directory / SIGNATURE} was made with {signer.key}, which {allowed_signers} does not allow"
            f"{f' for {identity}' if identity else ''}.",
            "Do not use the checkpoint unless you know whose key that is.",
        )
    for path in unlisted(directory, read_manifest(directory) or {"files": {}}):
        if not _may_be_unsigned(path):
            raise VerificationError(
                f"{directory / path} is not listed in {MANIFEST}, so nobody signed it.", "Remove it, or ask its maker."
            )
    return Signer(signer.key, name)


def _may_be_unsigned(path: str) -> bool:
    if "/" in path:
        return path.startswith(".cache/")
    return any(fnmatchcase(path, pattern) for pattern in UNSIGNED)


def _program() -> str:
    found = shutil.which("ssh-keygen")
    if found is None:
        raise UptrainError(
            "There is no ssh-keygen, which makes and checks signatures.", "Install OpenSSH's client, 8.2 or newer."
        )
    return found


def _ask(directory: Path, question: str, *options: str) -> subprocess.CompletedProcess[str]:
    with (directory / MANIFEST).open("rb") as manifest:
        return subprocess.run(
            [_program(), "-Y", question, *options, "-n", NAMESPACE, "-s", str(directory / SIGNATURE)],
            stdin=manifest, capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip


def _reason(said: str | None) -> str:
    lines = (said or "").strip().splitlines()
    return f" ({lines[-1].strip().rstrip('.')})" if lines else ""
