"""Write a plan's shards on a few threads. The model is never whole in memory."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import cache, partial
from typing import Any

from threadpoolctl import ThreadpoolController

from uptrain.checkpoint.checksum import Checksum, FollowingChecksum, checksum_file
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.nonfinite import ALLOW, only_finite
from uptrain.checkpoint.progress import State
from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.shard_writer import ShardContents
from uptrain.checkpoint.shared_work import SharedWorker, SoleWorker
from uptrain.conversion.plan.operations import Operation, unchanged_spans
from uptrain.conversion.plan.planner import Plan
from uptrain.conversion.run.inputs import ShardInputs
from uptrain.conversion.run.layers import LayerMaker
from uptrain.errors import Interrupted

POOLED_AT_ONCE = 2**29
"""Bytes of layers that are pooled at the same time: more would only wait for memory and disk together."""


class Pipeline:
    """Writes the shards of a plan on a few threads, and digests the source's files meanwhile.

    - `checkpoint`: the open source.
    - `plan`: what is made of it.
    - `state`: what is finished so far, in the folder that gets the shards.
    - `layers`: makes the changed attention layers.
    - `worker`: says which work is this process's.
    - `events`: receives `bytes`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        state: State,
        layers: LayerMaker,
        worker: SoleWorker | SharedWorker,
        events: Events,
    ) -> None:
        self.checkpoint, self.plan, self.state, self.layers = checkpoint, plan, state, layers
        self.worker, self.events, self.partial = worker, events, state.path.parent
        self.counted: set[str] = set()
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.followers = _followers(checkpoint, plan)
        pooled = plan.request.chosen_method.pools
        self.room = threading.Semaphore(max(1, POOLED_AT_ONCE // plan.peak_memory) if pooled else _workers())

    def run(self) -> None:
        """Write the shards, and digest the source's files, that are neither finished nor locked by another process.

        Digests of both go into the state, each as soon as it is known.
        """
        with _numpy_blas().limit(limits=1), self.layers.at_work():
            pool = ThreadPoolExecutor(max_workers=_workers(), thread_name_prefix="shard")
            try:
                _wait([pool.submit(self._locked, work) for work in self.left()])
            finally:
                self.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                self.stop.clear()

    def left(self) -> Mapping[str, Callable[[], None]]:
        """Return what no process has finished, by what it is called: shards, and source files that no shard follows.

        Nothing is left once OUT stands. Bytes of shards that others finished since are reported to `events.bytes`.
        """
        with self.lock:
            self.state.refresh()
            if not self.worker.is_unfinished():  # then what was finished last could not be read
                return {}
            for name in (self.plan.shards.keys() & self.state.shards.keys()) - self.counted:
                self.counted.add(name)
                self.events.bytes(sum(operation.output.nbytes for operation in self.plan.shards[name]))
            shards = [name for name in self.plan.shards if name not in self.state.shards]
            followed = {self.followers[name] for name in shards if name in self.followers}
            known = followed | self.state.sources.keys()
            files = [name for name in self.checkpoint.files if name not in known]
            writing = {f"shard {name}": partial(self._write, name) for name in shards}
            return writing | {f"digest of {name}": partial(self._digest, name) for name in files}

    def _locked(self, work: str) -> None:
        """Do a piece of work unless another process has it, or had it and finished."""
        with self.worker.lock_work(work) as free:
            act = self.left().get(work) if free else None
            if act:
                act()

    def _digest(self, file: str) -> None:
        digest = checksum_file(self.checkpoint.path / file, stopped=self.stop.is_set)
        if not self.stop.is_set():
            with self.lock:
                self.state.sources[file] = digest
                self.state.save()

    def _write(self, shard: str) -> None:
        """Write one shard, and digest the source file it follows, if it follows one."""
        file = self.followers.get(shard)
        follower = FollowingChecksum(self.checkpoint.path / file) if file else None
        operations = {operation.output.name: operation for operation in self.plan.shards[shard]}
        inputs = ShardInputs(self.checkpoint, self.layers, self.room, follower)

        def chunks(name: str) -> Iterator[memoryview]:
            for chunk in self._checked(operations[name], operations[name].chunks(inputs)):
                if self.stop.is_set():
                    raise Interrupted("Interrupted.")
                yield chunk

        checksum = Checksum()
        path = self.partial / shard
        spans = unchanged_spans(operations.values(), self.checkpoint)
        outputs = [operation.output for operation in operations.values()]
        contents = ShardContents(tensors=outputs, chunks=chunks, spans=spans)
        self.worker.write_shard(path, contents, checksum, self._advance)
        digest = follower.text() if follower else ""
        with self.lock:
            self.counted.add(shard)
            self.state.shards[shard] = checksum.text()
            if file:
                self.state.sources[file] = digest
            # Copies: other threads add layers meanwhile.
            self.state.layers.update({str(layer): energy for layer, energy in self.layers.energy.copy().items()})
            self.state.similarity.update({str(layer): found for layer, found in self.layers.similarity.copy().items()})
            self.state.orders.update({str(layer): order for layer, order in self.layers.orders.copy().items()})
            self.state.save()

    def _advance(self, count: int) -> None:
        with self.lock:
            self.events.bytes(count)

    def _checked(self, operation: Operation, chunks: Iterator[memoryview]) -> Iterator[memoryview]:
        """Refuse NaN and infinity, unless the request allows them or the operation refuses them itself."""
        if operation.checks_values or self.plan.request.allow_nonfinite:
            return chunks
        info = replace(self.checkpoint.tensors[operation.source], dtype=operation.output.dtype)
        return only_finite(chunks, info, self.checkpoint.path, ALLOW)


@cache
def _numpy_blas() -> ThreadpoolController:
    """Return what limits the threads of numpy's BLAS, which spin for their next work on the cores the shards need."""
    return ThreadpoolController().select(internal_api="openblas")


def _workers() -> int:
    # Two more than cores: reading, digesting and writing wait for memory and disk by turns.
    return min(8, (os.cpu_count() or 1) + 2)


def _followers(checkpoint: Checkpoint, plan: Plan) -> dict[str, str]:
    """Map each shard that is made from one source file, which feeds no other shard, to that file."""
    made_of = {
        shard: {checkpoint.tensors[each.source].file for each in operations}
        for shard, operations in plan.shards.items()
    }
    feeds = Counter(file for files in made_of.values() for file in files)
    single = {shard: next(iter(files)) for shard, files in made_of.items() if len(files) == 1}
    return {shard: file for shard, file in single.items() if feeds[file] == 1 and checkpoint.pickles is None}


def _wait(futures: list[Future[Any]]) -> None:
    # In short waits, so that Ctrl-C is heard on every platform.
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
