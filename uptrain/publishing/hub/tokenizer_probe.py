"""Try in a separate process whether a folder's tokenizer loads and knows any text. `push` runs it."""

from __future__ import annotations

import sys

from uptrain.errors import UptrainError, reported_as
from uptrain.publishing.hub.tokenizer import QUICK, REFUSED

_SCRIPTS = "The 1 de и ا ह 的 の"


def main(folder: str, mode: str) -> int:
    """Try the tokenizer of `folder`. Returns 0, or REFUSED after writing the reason to stdout."""
    if mode == QUICK:
        sys.modules["torch"] = None  # type: ignore[assignment]
    else:
        from uptrain.models.register import register

        register()
    from transformers import AutoTokenizer

    try:
        with reported_as(_refusal):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            found = tokenizer(_SCRIPTS, add_special_tokens=False)["input_ids"]
    except UptrainError as error:
        sys.stdout.write(error.message)
        return REFUSED
    # A tokenizer may load without its vocabulary, and then knows no word.
    if not set(found) - {tokenizer.unk_token_id}:
        sys.stdout.write("it has no vocabulary")
        return REFUSED
    return 0


def _refusal(reason: str) -> UptrainError:
    return UptrainError(reason if " " in reason else f"it lacks {reason}")  # the text of a KeyError is the key alone


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
