"""What an unfinished conversion has done so far, kept in OUT.partial so that the same command can go on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uptrain.checkpoint.checksum import algorithm_of
from uptrain.checkpoint.files import write_atomic
from uptrain.checkpoint.jsonfile import dump_json, parse_object
from uptrain.checkpoint.output_folder import STATE
from uptrain.errors import UptrainError

FINISHED = ("shards", "sources", "layers", "similarity", "orders")
"""What is kept of finished work; several processes that build one folder add theirs to it."""


@dataclass(frozen=True)
class Earlier:
    """What an earlier run's state is of: its plan, its command's digest and words, and whether a shard is finished."""

    plan: str
    command: str
    asked: str
    worked: bool


class State:
    """What has been finished in OUT.partial: the plan's digest, the checksum of each whole shard and of each of the
    source's files that was read, and notes by layer.

    Of each layer `layers` has the energy that is kept, `similarity` how alike its heads were, `orders` in which
    order its key/value heads stand now.

    `command` digests what was asked for and of which folder, so that a changed source can be told from another wish;
    `asked` is the command line that asks for it.
    """

    def __init__(self, folder: Path, plan: str, command: str = "", asked: str = "") -> None:
        self.path = folder / STATE
        self.plan, self.command, self.asked = plan, command, asked
        self.shards: dict[str, str] = {}
        self.sources: dict[str, str] = {}
        self.layers: dict[str, Any] = {}
        self.similarity: dict[str, Any] = {}
        self.orders: dict[str, Any] = {}

    def load(self) -> Earlier | None:
        """Read an earlier run's state; return what it was of, or None where there is none that can be used.

        Its shards, sources and layers are taken over if the plan is this one.

        Raises:
            OSError: it is there but can't be read, which is no reason to begin again.
        """
        try:
            value = parse_object(self.path.read_bytes(), str(self.path))
            dump_json(value)  # as its notes go into the manifest
        except (FileNotFoundError, NotADirectoryError, UptrainError, ValueError):
            return None
        shards, sources, layers = (value.get(name) for name in ("shards", "sources", "layers"))
        if value.get("plan") == self.plan and isinstance(shards, dict) and isinstance(layers, dict):
            self.shards = {name: str(text) for name, text in shards.items()}
            self.layers = {layer: kept for layer, kept in layers.items() if layer.isdecimal()}
            found = sources.items() if isinstance(sources, dict) else ()
            self.sources = {name: text for name, text in found if isinstance(text, str) and algorithm_of(text)}
            for name in ("similarity", "orders"):
                notes = value.get(name)
                if isinstance(notes, dict):
                    setattr(self, name, {layer: found for layer, found in notes.items() if layer.isdecimal()})
        return Earlier(str(value.get("plan")), str(value.get("command")), str(value.get("asked") or ""), bool(shards))

    def refresh(self) -> None:
        """Read what other processes have finished: nothing, where one works alone."""

    def save(self) -> None:
        """Write the state atomically."""
        names = ("plan", "command", "asked", *FINISHED)
        write_atomic(self.path, dump_json({name: getattr(self, name) for name in names}))
