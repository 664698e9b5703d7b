"""Refuse what a family can't become. Each error says why, and what the user can do."""

from __future__ import annotations

from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.schema import Family
from uptrain.conversion.request import Request
from uptrain.errors import CheckpointError, UsageError
from uptrain.methods.registry import method_options

_HEADS = ("lm_head.weight", "embed_out.weight", "proj_out.weight")
_INNER_EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def check_listed(source: CheckpointDescription) -> None:
    """Refuse a checkpoint whose index lists a tensor that no shard holds, unless its class makes it itself.

    A class makes its buffers, and a head or an inner embedding that is tied to the stored embedding. The class's own
    list of names needs torch; the index shows without torch that a tensor is missing.

    Raises:
        CheckpointError: a tensor is missing.
    """
    tied = (*_HEADS, *_INNER_EMBEDDINGS) if source.config.get("tie_word_embeddings") is not False else ()
    for name in source.checkpoint.absent:
        if not name.endswith((*tied, *source.family.buffers)):
            raise CheckpointError(
                f"{source.checkpoint.path / source.checkpoint.index} lists tensor {name}, which no shard holds.",
                "Download the checkpoint again.",
            )


def check_method(source: CheckpointDescription, request: Request) -> None:
    """Refuse a method or grouping that isn't exact for this family.

    Raises:
        UsageError: the method or grouping isn't exact.
    """
    if request.kind.latent and not source.family.targets.get("mla"):
        return  # the error that no class holds a latent comes later, and says more
    why = source.why_pool_only
    if why and request.chosen_method.mixes_dims:
        raise UsageError(
            f"--method {request.method} can't be used on {source.name}: {why}.",
            "Use --method mean and uptrain the result.",
        )
    if source.key_norm is not None and (request.kind.latent or request.chosen_method.pool_norm is None):
        raise UsageError(
            f"--method {request.method} can't be used on {source.name}: {source.why_keys_pool}.",
            "Use --method mean, or svd, which pools the keys and factors the values.",
        )
    if source.family.uncalibrated and request.chosen_method.needs_text:
        raise UsageError(
            f"--method {request.method} can't be used on {source.name}: {source.family.uncalibrated}.",
            "Use --method svd.",
        )
    why = source.why_fixed_order
    if why and request.chosen_grouping.moves:
        raise UsageError(
            f"--grouping {request.grouping} can't be used on {source.name}: {why}.", "Leave --grouping out."
        )


def method_notes(source: CheckpointDescription, request: Request, shares: bool) -> tuple[str, ...]:
    """Return what a method leaves undone on this family; `shares` tells whether heads come to share one."""
    if shares and source.key_norm is not None and request.chosen_method.mixes_dims:
        return (f"Keys of {source.name} are normed, so --method {request.method} pools keys and factors values.",)
    return ()


def check_inside(source: CheckpointDescription, request: Request) -> None:
    """Refuse a target that needs a class of its own where a wrapper holds the language model.

    Raises:
        UsageError: the target needs a class of its own there.
    """
    if source.wrapped_in and request.kind.latent:
        raise UsageError(
            f"--to mla can't be used on {source.name}: a latent needs a class of its own, which has no place in a "
            f"{source.wrapped_in}.",
            "Use --to gqa or --to mqa.",
        )


def check_groups(source: CheckpointDescription, target: Family, groups: int) -> None:
    """Refuse a number of key/value heads that the target class can't have.

    Raises:
        UsageError: the target class can't have that number.
    """
    if not source.as_family(target).holds_groups(groups):
        raise UsageError(
            f"{source.name} can't have {groups} key/value heads: without {target.keys.grouped} "
            f"{source.family.model_type} has one or all.",
            "Use --to mqa.",
        )


def check_effects(request: Request, groups: int, heads: int, name: str) -> None:
    """Refuse options that change nothing.

    - `request`: what the user asks.
    - `groups`: the result's key/value heads.
    - `heads`: the source's key/value heads.
    - `name`: what the user called the source.

    Raises:
        UsageError: an option has no effect.
    """
    given = [option for option in method_options() if getattr(request, option) is not None]
    given += ["grouping"] if request.chosen_grouping.moves else []
    if given and groups == heads:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(
            f"{option} has no effect: {name} keeps all its {heads} key/value heads.",
            f"Ask for fewer --groups, or leave {option} out.",
        )
    if groups == 1 and request.chosen_grouping.moves:
        raise UsageError(f"--grouping {request.grouping} has no effect: all heads share one.", "Leave --grouping out.")
