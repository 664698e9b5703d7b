"""How a run is spread over processes: each with all weights (DDP), or each with a share of them (FSDP2).

FSDP is PyTorch's `fully_shard` itself on any device, so that what runs on GPUs is what the tests run on CPUs.
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
from uptrain.models.checks import check_tokens
from uptrain.training.batches import Batch, Boundary, batch_of
from uptrain.training.distillation import Objective
from uptrain.training.losses import IGNORED
from uptrain.training.metrics import LossMetrics


class ParallelObjective:
    """An objective on its devices, and the few things that differ between DDP and FSDP."""

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
            # Its forward pass is under autocast from here on; under FSDP the weights themselves are cast.
            self.module = accelerator.prepare(objective)

    def batch(self, blocks: Tokens, boundary: Boundary | None) -> Batch:
        """Return blocks (sequences, tokens) as a batch, with documents kept apart where there is a boundary.

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
        """Exchange gradients only after the last micro-batch of a step."""
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
        """Run forward passes without gradients, as the model will be used."""
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()
            if self.sharded:
                # Without a backward pass, what is in no layer would stay whole, and an optimizer take that for its own.
                self.module.reshard()

    def isolates_documents(self) -> bool:
        """Tell whether positions that start anew keep attention inside a document: not every class reads them so."""
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
                    # A class that takes no positions at all.
                    return False
        return abs(losses[0] - losses[1]) < 1e-3 * max(1.0, abs(losses[0]))

    def close(self) -> None:
        """Break what ties models to themselves, so that their memory is free as soon as nobody else refers to them."""
        # accelerate puts a method of the module, bound to it, into the module itself.
        for name in ("forward", "_original_forward"):
            vars(self.objective).pop(name, None)
        for model in (self.objective, self.objective.teacher):
            for module in () if model is None else model.modules():
                # What `compile` made, which is bound to the module too.
                module._compiled_call_impl = None
        self.objective.forget()
        self.module = None
        self.accelerator.free_memory()

    def clip(self, limit: float) -> float:
        """Scale gradients so that their norm is no more than `limit`; return what it was."""
        norm = nn.utils.clip_grad_norm_([p for p in self.module.parameters() if p.requires_grad], limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _shard(objective: Objective, accelerator: Accelerator) -> None:
    low = accelerator.mixed_precision == "bf16"
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if low else MixedPrecisionPolicy(),
    }
    # Layer by layer, so that only one layer is ever in memory in fp32 and whole: the rest is still memory-mapped.
    for layer in decoder_layers(objective.student):
        fully_shard(layer.float(), **settings)
    objective.student.float()
    fully_shard(objective, **settings, reshard_after_forward=False)
    if objective.teacher is not None:
        _shard_teacher(objective.teacher, settings["mesh"], accelerator.device)


def _shard_teacher(teacher: Any, mesh: DeviceMesh, device: torch.device) -> None:
    # Its embeddings and head stay whole on every device: they are used outside its own forward pass.
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
    """Return a model's layers: its longest list of modules of one class."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def whole(value: Tensor) -> Tensor:
    """Return a tensor that every process holds all of; all processes must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value
