"""A run on several processes: each has all weights (DDP), or each has a part of them (FSDP2).

FSDP is PyTorch's `fully_shard` on every device, so that the tests on CPUs run the same code as GPUs do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from uptrain.data.block_reader import Tokens
from uptrain.data.boundary import Boundary
from uptrain.data.text_encoder import TextEncoder
from uptrain.errors import UsageError
from uptrain.models.checks import check_tokens
from uptrain.training.batches import Batch, batch_of
from uptrain.training.distillation import Objective
from uptrain.training.losses import IGNORED
from uptrain.training.metrics import LossMetrics


class ParallelObjective:
    """An objective on this process's device, and what differs between DDP and FSDP.

    - `objective`: student, teacher and loss.
    - `accelerator`: this process's device and its connection to the others.
    - `shard`: whether to divide weights between processes (FSDP).
    """

    def __init__(self, objective: Objective, accelerator: Accelerator, shard: bool) -> None:
        self.objective, self.accelerator = objective, accelerator
        self.sharded = shard
        if self.sharded:
            _shard(objective, accelerator)
            self.module: Any = objective
        else:
            objective.student.float()
            if objective.teacher is not None:
                objective.teacher.to(accelerator.device)
            # From here on the forward pass runs under autocast; under FSDP, the weights are cast instead.
            self.module = accelerator.prepare(objective)

    def batch(self, blocks: Tokens, boundary: Boundary | None) -> Batch:
        """Return blocks (sequences, tokens) as a batch, with separate documents where there is a boundary.

        Raises:
            UsageError: the student has no embedding of a token.
        """
        check_tokens(self.objective.student, blocks)
        return batch_of(blocks, boundary, self.objective.has_encoder)

    def losses(self, part: Batch) -> Tensor:
        """Return the sums over a batch's tokens that `Objective.forward` returns, (4,) in fp32."""
        part = part.to(self.accelerator.device)
        found: Tensor = self.module(part.ids, part.targets, part.position_ids)
        return found

    def metrics(self, sums: Tensor, tokens: int) -> LossMetrics:
        """Return the means of such sums, (4,), of all processes over `tokens` tokens."""
        teacher = self.objective.teacher is not None
        return LossMetrics.of(sums, tokens, teacher, teacher and self.objective.distill.hidden_weight > 0)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Exchange gradients between processes only after the last micro-batch of a step."""
        if self.accelerator.num_processes == 1 or last:
            if self.sharded:
                self.module.set_requires_gradient_sync(True)
            yield
        elif self.sharded:
            self.module.set_requires_gradient_sync(False)
            yield
        else:
            with self.accelerator.no_sync(self.module):
                yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run the forward passes of the block in eval mode and without gradients."""
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()
            if self.sharded:
                # Without a backward pass, parameters outside the layers would stay whole, and the optimizer would use
                # the whole tensors as its own.
                self.module.reshard()

    def boundary(self, encoder: TextEncoder, isolate: bool | None) -> Boundary | None:
        """Return the token between documents that attention must not cross, or None where it may.

        `isolate` is what the recipe asks for; None isolates documents where the model's class can.

        Raises:
            UsageError: the recipe asks for it, and the class can't.
        """
        found = Boundary.of(encoder) if isolate is not False else None
        if found is None or self.isolates_documents():
            return found
        if isolate:
            raise UsageError(
                "This model's class can't keep documents in a block apart.", "Leave out isolate_documents."
            )
        return None

    def isolates_documents(self) -> bool:
        """Return whether positions that start at 0 keep attention inside a document; not every class does that."""
        device = self.accelerator.device
        positions = torch.tensor([[0, 1, 0, 1]], device=device)
        targets = torch.tensor([[IGNORED, IGNORED, 3, IGNORED]], device=device)
        losses = []
        with self.evaluating():
            for before in ([0, 1], [4, 5]):
                ids = torch.tensor([[*before, 2, 3]], device=device)
                try:
                    losses.append(float(self.module(ids, targets, positions)[1]))
                except TypeError:
                    # The class has no parameter for positions.
                    return False
        return abs(losses[0] - losses[1]) < 1e-3 * max(1.0, abs(losses[0]))

    def close(self) -> None:
        """Break the models' reference cycles, so that their memory is free as soon as no caller refers to them."""
        # accelerate stores a bound method of the module in the module.
        for name in ("forward", "_original_forward"):
            vars(self.objective).pop(name, None)
        for model in (self.objective, self.objective.teacher):
            for module in () if model is None else model.modules():
                # `compile` also stores a callable that is bound to the module.
                module._compiled_call_impl = None
        self.objective.forget()
        self.module = None
        self.accelerator.free_memory()

    def clip(self, limit: float) -> float:
        """Scale gradients so that their norm is at most `limit`; return the norm before."""
        norm = nn.utils.clip_grad_norm_([p for p in self.module.parameters() if p.requires_grad], limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _shard(objective: Objective, accelerator: Accelerator) -> None:
    low = accelerator.mixed_precision == "bf16"
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if low else MixedPrecisionPolicy(),
    }
    # Layer by layer, so that only one whole layer is in memory in fp32 at a time: the others are memory-mapped.
    for layer in decoder_layers(objective.student):
        fully_shard(layer.float(), **settings)
    objective.student.float()
    fully_shard(objective, **settings, reshard_after_forward=False)
    if objective.teacher is not None:
        _shard_teacher(objective.teacher, settings["mesh"], accelerator.device)


def _shard_teacher(teacher: Any, mesh: DeviceMesh, device: torch.device) -> None:
    # The teacher's embeddings and head stay whole on every device: they are used outside its forward pass.
    for layer in decoder_layers(teacher):
        fully_shard(layer, mesh=mesh)
    for module in teacher.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not isinstance(value, DTensor) and value.device != device:
                if isinstance(value, nn.Parameter):
                    value.data = value.data.to(device)
                else:
                    setattr(module, name, value.to(device))


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return a model's layers: its longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def whole(value: Tensor) -> Tensor:
    """Return the whole tensor in every process; all processes must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value
