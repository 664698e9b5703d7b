"""OUT.run: the files of an unfinished training run, from which the same command resumes."""

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

# The keys that may change between interruption and resumption. The last three change only how a step is computed,
# which a run without enough memory may need.
_MAY_CHANGE = {
    "allow_pickle", "overwrite", "log_every", "save_every", "eval_every", "eval_every_tokens", "output", "trackers",
    "gradient_accumulation", "gradient_checkpointing", "fsdp",
}  # fmt: skip
_OURS = re.compile(r"(recipe\.json|train_log\.jsonl)(\.tmp)?|tokens|(tokenizer|best|checkpoint-\d+)(\.partial)?")
"""The names that a run creates in its folder. The folder is deleted with its contents after the run."""


class RunFolder:
    """The folder next to the output: tokens, log, and the newest complete checkpoint.

    A checkpoint is written under another name and renamed when all its bytes are on the disk. So a folder with the name
    of a checkpoint is always complete.
    """

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(output.name + ".run")
        self.log = self.path / "train_log.jsonl"
        self.tokens = self.path / "tokens"
        self.tokenizer = self.path / "tokenizer"
        self._lock: IO[str] | None = None

    def open(self, recipe: Recipe, restart: bool = False) -> None:
        """Lock the folder for this process and create it, or check that its run is of this recipe.

        - `recipe`: the recipe to run.
        - `restart`: delete an unfinished run.

        Raises:
            UsageError: the folder holds a run of another recipe or a file of another program, or it is in use.
        """
        self._take()
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
                    "Run it with its own values, or start again with --restart.",
                )
            if not changed:
                return
            self._empty()
        write_atomic(file, dump_json(values))

    def discard(self) -> None:
        """Delete an unfinished run.

        Raises:
            UsageError: the folder holds a file of another program, or it is in use.
        """
        self._take()
        self.remove()

    def _take(self) -> None:
        self._check_own()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / LOCK).open("w")
        try:
            free = try_lock(self._lock)
        except OSError:
            free = False
        if not free:
            self._lock.close()  # the folder is the other run's: `__exit__` must not delete it
            raise UsageError(
                f"Another run is training in {self.path}.", "Wait for it, or choose another output."
            ) from None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        """Unlock the folder; delete it after an error if it has nothing to resume from."""
        locked = self._lock is not None and not self._lock.closed
        if locked and error is not None and not self.log.is_file() and not self._worked():
            self.remove()
        self.close()

    def _check_own(self) -> None:
        entries = self.path.iterdir() if self.path.is_dir() else ()
        # File systems and desktops add hidden files.
        others = (each.name for each in entries if not (_OURS.fullmatch(each.name) or _is_hidden_file(each)))
        strange = min(others, default=None)
        if strange is not None:
            raise UsageError(
                f"The run folder {self.path} holds a file of another program: {strange}.",
                "Choose another output, or move the file: the folder is deleted after the run.",
            )

    def _worked(self) -> bool:
        """Return whether the folder has something to resume from: a checkpoint, a tokenizer or tokens."""
        made = [*self.checkpoints(), self.path / "best", self.tokenizer, *self.tokens.glob("*/")]
        return any(path.is_dir() for path in made)

    def close(self) -> None:
        """Unlock the folder."""
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
        """Return the complete checkpoints, oldest first."""
        found = [path for path in self.path.glob("checkpoint-*") if not path.suffix]
        return sorted(found, key=lambda path: int(path.name.partition("-")[2]))

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest complete checkpoint and the values of its state.json, or None."""
        found = self.checkpoints()
        return (found[-1], read_json(found[-1] / "state.json")) if found else None

    def save(self, step: int, values: dict[str, Any], write: Callable[[Path], None], accelerator: Accelerator) -> None:
        """Write the checkpoint of a step completely or not at all, and remove the older ones; all processes call this.

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
        """Yield an empty folder that replaces the folder `name` after the block, when all its bytes are on the disk."""
        partial, final = self.path / f"{name}.partial", self.path / name
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        sync_folder(partial)
        shutil.rmtree(final, ignore_errors=True)
        rename_folder(partial, final)

    def rewind_log(self, step: int) -> None:
        """Remove log lines after `step`: an interrupted run logged steps that the resumed run repeats."""
        if not self.log.is_file():
            return
        lines = self.log.read_text(encoding="utf-8").splitlines()
        remaining = [line for line in lines if _step(line) is not None and (_step(line) or 0) <= step]
        write_atomic(self.log, "".join(line + "\n" for line in remaining))

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
    # A killed process can leave an incomplete last line.
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
