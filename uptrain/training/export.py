"""A trained model as a checkpoint folder: gather weights, merge adapters, fold norms, store in the recipe's dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uptrain.errors import UptrainError
from uptrain.models import neutral_norm
from uptrain.models.class_fit import listed
from uptrain.models.saving import save
from uptrain.training.parallel import whole
from uptrain.training.run_folder import RunFolder
from uptrain.training.setup import TrainingSetup


def write_best(setup: TrainingSetup, run_folder: RunFolder) -> None:
    """Write the model into the run folder as the best so far; all processes call this."""
    if setup.accelerator.is_main_process:
        with run_folder.replacing("best") as folder:
            write_model(setup, folder)
    else:
        write_model(setup, None)
    setup.accelerator.wait_for_everyone()


def write_model(setup: TrainingSetup, folder: Path | None) -> None:
    """Write the present model; all processes call this, and the one with a folder writes."""
    student = setup.objective.objective.student
    weights = gather(student, setup.dtype, keep=folder is not None)
    if folder is not None:
        model = assemble(student, weights, setup.dtype)
        save(model, setup.tokenizer, folder, setup.dtype, setup.model)


@torch.no_grad()
def gather(student: Any, dtype: torch.dtype, keep: bool = True) -> dict[str, Tensor]:
    """Return a model's weights by name, with adapters added to the weights that they adapt; all processes call this.

    Only one whole tensor is in fp32 at a time.

    - `student`: the trained model, possibly divided between processes or inside a peft model.
    - `dtype`: the dtype of the result, which is on the CPU.
    - `keep`: whether this process needs the tensors; else the result is empty.
    """
    found: dict[str, Tensor] = {}
    tied = set(getattr(student, "all_tied_weights_keys", None) or ())
    for name, value in student.state_dict(keep_vars=True).items():
        short = _plain_name(name)
        if short is None or short in tied:
            continue
        full = whole(value.detach())
        delta = _delta(student, name)
        if keep:
            full = full if delta is None else full + delta.to(full)
            found[short] = full.to(device="cpu", dtype=dtype if full.is_floating_point() else full.dtype).clone()
    return found


@torch.no_grad()
def assemble(student: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Return a new model on the CPU with these weights, of the student's class; the student does not change."""
    plain = student.get_base_model() if hasattr(student, "get_base_model") else student
    with torch.device("meta"):
        model = type(plain)(plain.config)
    for name, module in plain.named_modules():
        if isinstance(module, neutral_norm.AbsentNorm):
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, neutral_norm.AbsentNorm(module.width, module.eps))
    left = model.load_state_dict(weights, strict=False, assign=True)
    # The config may say that the head is tied, although the student was loaded with a separate head.
    model.all_tied_weights_keys = dict(plain.all_tied_weights_keys)
    model.tie_weights(recompute_mapping=False)
    lost = [*left.unexpected_keys, *(name for name, value in model.named_parameters() if value.is_meta)]
    if lost:
        raise UptrainError(f"The trained model can't be written: its class and its weights differ in {listed(lost)}.")
    neutral_norm.fold(model, dtype)
    return model


def _plain_name(name: str) -> str | None:
    """Return a weight's name without peft's parts, or None for a weight of an adapter."""
    if ".lora_" in name:
        return None
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _delta(student: Any, name: str) -> Tensor | None:
    owner, _, last = name.rpartition(".base_layer.")
    if last != "weight" or not owner:
        return None
    module: nn.Module = student.get_submodule(owner)
    delta: Tensor = module.get_delta_weight("default")  # type: ignore[operator]
    return delta
