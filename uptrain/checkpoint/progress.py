"""The state of an unfinished conversion in OUT.partial, with which the same command resumes."""

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
"""The parts of the state that record finished work; each worker of a shared folder adds its own."""


@dataclass(frozen=True)
class Earlier:
    """What an earlier run was for.

    Attributes:
        plan: the digest of its plan.
        command: the digest of what was asked for, and of the source's folder.
        asked: its command line.
        worked: whether a shard is finished.
    """

    plan: str
    command: str
    asked: str
    worked: bool


class State:
    """The finished work in OUT.partial.

    Attributes:
        plan: the digest of the plan.
        command: the digest of the request and the source's folder. With it, a changed source differs from another
            request.
        asked: the command line.
        shards: the checksum of each finished shard.
        sources: the checksum of each file of the source that was read.
        layers: the explained energy of each layer.
        similarity: the head similarity of each layer.
        orders: the source's key/value heads in the result's order, for each layer whose heads moved.
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
        """Read an earlier run's state; return what that run was for, or None where there is no usable state.

        Its shards, sources and layers are taken over if the plan is the same.

        Raises:
            OSError: the state exists but can't be read, so the run must not begin again.
        """
        try:
            value = parse_object(self.path.read_bytes(), str(self.path))
            dump_json(value)  # its notes go into the manifest
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
        """Read what other workers have finished: nothing, as a run alone has no other workers."""

    def save(self) -> None:
        """Write the state atomically."""
        names = ("plan", "command", "asked", *FINISHED)
        write_atomic(self.path, dump_json({name: getattr(self, name) for name in names}))
