"""OUT.run: what an unfinished training run has on disk, so that the same command goes on where it stopped."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from accelerate import Accelerator

from uptrain.checkpoint.files import rename_folder, sync_folder, write_atomic
from uptrain.checkpoint.jsonfile import dump_json, read_json
from uptrain.checkpoint.locks import LOCK, try_lock
from uptrain.errors import UptrainError, UsageError
from uptrain.training.recipe import Recipe

# The last ones change where and in how many parts a step is computed, which a run short of memory may have to.
_MAY_CHANGE = {
    "allow_pickle", "overwrite", "log_every", "save_every", "eval_every", "eval_every_tokens", "output", "trackers",
    "gradient_accumulation", "gradient_checkpointing", "fsdp",
}  # fmt: skip
_OURS = re.compile(r"(recipe\.json|train_log\.jsonl)(\.tmp)?|tokens|(tokenizer|best|checkpoint-\d+)(\.partial)?")
"""What a run makes in its folder, which is deleted with all that is in it once the run is done."""


class RunFolder:
    """The folder beside the output: tokens, log, and the newest complete checkpoint.

    A checkpoint is written under another name and renamed when all its bytes are on the disk, so a folder with a
    checkpoint's name is whole, whatever happened.
    """

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(output.name + ".run")
        self.log = self.path / "train_log.jsonl"
        self.tokens = self.path / "tokens"
        self.tokenizer = self.path / "tokenizer"
        self._lock: IO[str] | None = None

    def open(self, recipe: Recipe, restart: bool = False) -> None:
        """Take the folder for this process: create it, or check that the run in it is of this recipe.

        Raises:
            UsageError: it holds a run of another recipe or what no run makes, or another process is running it.
        """
        self._check_own()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / LOCK).open("w")
        try:
            free = try_lock(self._lock)
        except OSError:
            free = False
        if not free:
            raise UsageError(
                f"Another run is training in {self.path}.", "Wait for it, or choose another output."
            ) from None
        if restart:
            self._empty()
        values = {key: value for key, value in recipe.to_dict().items() if key not in _MAY_CHANGE}
        file = self.path / "recipe.json"
        if file.is_file():
            earlier = read_json(file)
            changed = sorted(key for key in {*earlier, *values} if earlier.get(key) != values.get(key))
            if changed and self._worked():
                differences = (f"{key} ({_short(earlier.get(key))}, not {_short(values.get(key))})" for key in changed)
                raise UsageError(
                    f"{self.path} holds an unfinished run with another {', '.join(differences)}.",
                    "Run it with its own values, or start anew with --restart.",
                )
            if not changed:
                return
            self._empty()
        write_atomic(file, dump_json(values))

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        """Let another process take the folder; delete it after an error before there was anything to go on with."""
        mine = self._lock is not None and not self._lock.closed
        if mine and error is not None and not self.log.is_file() and not self._worked():
            self.remove()
        self.close()

    def _check_own(self) -> None:
        entries = self.path.iterdir() if self.path.is_dir() else ()
        # A file system or a desktop adds hidden files of its own.
        others = (each.name for each in entries if not (_OURS.fullmatch(each.name) or _is_hidden_file(each)))
        strange = min(others, default=None)
        if strange is not None:
            raise UsageError(
                f"{self.path} is where this run would be kept, and holds {strange}, which is none of a run's.",
                "Choose another output, or move that away: the folder is deleted when the run is done.",
            )

    def _worked(self) -> bool:
        """Say whether a run left what the same run goes on with: a checkpoint, a tokenizer or tokens of its own."""
        made = [*self.checkpoints(), self.path / "best", self.tokenizer, *self.tokens.glob("*/")]
        return any(path.is_dir() for path in made)

    def close(self) -> None:
        """Let another process take the folder."""
        if self._lock:
            self._lock.close()

    def remove(self) -> None:
        """Delete the folder."""
        self.close()
        shutil.rmtree(self.path)

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()

    def checkpoints(self) -> list[Path]:
        """Return the whole checkpoints, oldest first."""
        found = [path for path in self.path.glob("checkpoint-*") if not path.suffix]
        return sorted(found, key=lambda path: int(path.name.partition("-")[2]))

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest whole checkpoint and its state, or None."""
        found = self.checkpoints()
        return (found[-1], read_json(found[-1] / "state.json")) if found else None

    def save(self, step: int, values: dict[str, Any], write: Callable[[Path], None], accelerator: Accelerator) -> None:
        """Write the checkpoint of a step, whole or not at all, and remove the older ones; all processes call this.

        - `step`: the number of finished steps.
        - `values`: what state.json holds.
        - `write`: writes the tensors into the folder it is given; all processes call it.
        - `accelerator`: lets the processes wait for each other.

        Raises:
            UptrainError: the disk is full or can't be written.
        """
        partial = self.path / f"checkpoint-{step}.partial"
        if accelerator.is_main_process:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        try:
            write(partial)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                self._commit(partial, values)
        except OSError as error:
            self._abandon(partial, step, error)
        accelerator.wait_for_everyone()

    def _commit(self, partial: Path, values: dict[str, Any]) -> None:
        (partial / "state.json").write_text(json.dumps(values))
        sync_folder(partial)
        older = self.checkpoints()
        final = partial.with_suffix("")
        if final.exists():
            shutil.rmtree(final)
        rename_folder(partial, final)
        for path in older:
            if path != final:
                shutil.rmtree(path)

    def _abandon(self, partial: Path, step: int, error: OSError) -> NoReturn:
        shutil.rmtree(partial, ignore_errors=True)
        whole = self.checkpoints()
        left = f"{whole[-1].name} is whole" if whole else "there is no earlier one"
        reason = error.strerror or str(error)
        raise UptrainError(
            f"The checkpoint of step {step} could not be written to {self.path}: {reason}; {left}.",
            "Make room and run the same command again.",
        ) from None

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """Yield an empty folder that takes the place of the one called `name` when all its bytes are on the disk."""
        partial, final = self.path / f"{name}.partial", self.path / name
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        sync_folder(partial)
        shutil.rmtree(final, ignore_errors=True)
        rename_folder(partial, final)

    def rewind_log(self, step: int) -> None:
        """Drop log lines after `step`: a run that was cut off logged steps that it is about to repeat."""
        if not self.log.is_file():
            return
        lines = self.log.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step(line) is not None and (_step(line) or 0) <= step]
        write_atomic(self.log, "".join(line + "\n" for line in kept))

    def record(self, entry: dict[str, Any]) -> None:
        """Append one line to the log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _is_hidden_file(path: Path) -> bool:
    return path.name.startswith(".") and path.is_file()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _step(line: str) -> int | None:
    # A kill can cut the last line short.
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
