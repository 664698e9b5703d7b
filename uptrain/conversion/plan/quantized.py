"""Refuse requests that would read a quantized checkpoint's codes as weights, or make its quantization_config wrong."""

from __future__ import annotations

from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.projections import PARTS, modules_of
from uptrain.architectures.quantization import ORIGINAL, Quantization, check_declared
from uptrain.conversion.request import Request
from uptrain.errors import CheckpointError, UsageError
from uptrain.models.target import TargetClass


def check_attention(source: CheckpointDescription) -> Quantization | None:
    """Return how a checkpoint is quantized, None where it isn't; its attention must hold floating values.

    Raises:
        CheckpointError: the attention's weights are codes, or what stands for a projection's weight is something else.
    """
    modules = modules_of(source.family.projections, frozenset(PARTS))
    linears = [
        f"{source.attention_name(layer)}{module}" for layer in range(len(source.attention)) for module in modules
    ]
    found, name = source.quantization, source.name
    if found is None:
        return None
    starts = tuple(f"{linear}." for linear in linears)
    inside = sorted(tensor for tensor in found.tensors if tensor.startswith(starts))
    if inside:
        raise CheckpointError(
            f"{name} is quantized with {found.describe()}, its attention too: tensor {inside[0]} is "
            f"{source.tensors[inside[0]].dtype}, and codes can't be pooled or factored.",
            ORIGINAL,
        )
    for linear in linears:
        if f"{linear}.weight" not in source.tensors:
            raise CheckpointError(
                f"{name} is quantized with {found.describe()} and has no tensor {linear}.weight.", ORIGINAL
            )
    return found


def check_quantized(source: CheckpointDescription, request: Request) -> None:
    """Refuse a request that would change codes, or that makes scales wrong that were measured on the source's heads.

    Raises:
        CheckpointError: the attention is quantized, or other parts are and config.json doesn't say so.
        UsageError: `--dtype` or calibration, which would take codes for numbers, or a quantized key/value cache.
    """
    found, name = check_attention(source), source.name
    check_declared(found, name)
    if found is None:
        return
    if request.dtype and found.tensors:
        raise UsageError(
            f"--dtype {request.dtype} can't be used on {name}, parts of which are quantized with {found.describe()}: "
            "their values mean nothing without their scales.",
            "Leave --dtype out.",
        )
    if request.chosen_method.needs_text:
        raise UsageError(
            f"--method {request.method} can't be used on {name}, parts of which are quantized with {found.describe()}: "
            "its layers can't be run from codes.",
            "Use --method svd.",
        )
    if found.cache:
        raise UsageError(
            f"{name} has a quantized key/value cache, by scales that were measured on heads as they are.", ORIGINAL
        )


def check_target(source: CheckpointDescription, target: TargetClass, latent: bool) -> None:
    """Refuse a target class whose modules have other names or other weights than quantization_config lists.

    Raises:
        UsageError: codes would have to be folded, transposed or scaled, or lists of modules would no longer fit.
    """
    own, other = source.family, target.family
    renamed = latent or (own.projections, own.layer, own.prefixes) != (other.projections, other.layer, other.prefixes)
    changed = (
        target.renames or target.folds or target.transposes or target.shifts or target.zeros or target.attention_norm
    )
    if not renamed and not changed:
        return
    found = source.quantization
    if found is None:
        return
    hint = "Use --to gqa or --to mqa, or convert the full-precision original." if latent else ORIGINAL
    if not found.tensors:
        hint += " If these weights aren't quantized, remove quantization_config from config.json."
    raise UsageError(
        f"{source.name} has parts that are quantized with {found.describe()}, and as a {target.name} its modules have "
        "other names or weights than its quantization_config speaks of.",
        hint,
    )
