"""What a checkpoint can become within a cache budget, and the energy that each result explains without training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from uptrain.architectures.description import describe_checkpoint
from uptrain.architectures.projections import read_layer
from uptrain.checkpoint.reader import Checkpoint, open_checkpoint
from uptrain.checkpoint.source import resolve
from uptrain.conversion.class_checks.weights import check_classes
from uptrain.conversion.plan.planner import Plan, make_plan
from uptrain.conversion.possible_targets import head_requests, latent_requests
from uptrain.conversion.run.layers import LayerMaker
from uptrain.errors import UsageError, check_installed
from uptrain.formatting import typed
from uptrain.methods import energy_numpy

SAMPLE = 4
"""The most layers whose energy is computed, evenly spaced: each costs a factorisation."""


@dataclass(frozen=True)
class Suggestion:
    """One thing that the checkpoint can become within the budget.

    - `target`, `options`, `method`: what makes it.
    - `cache_bytes_per_token`, `cache`: its cache, in bytes and as a share of the source's.
    - `keys`, `values`: the mean shares of key and value energy that `method` explains in `layers`.
    - `host`: the model type of the class that holds it.
    """

    target: str
    options: str
    method: str
    cache_bytes_per_token: int
    cache: float
    keys: float
    values: float
    layers: tuple[int, ...]
    host: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def suggest(model: str, budget: float, *, revision: str | None = None, allow_pickle: bool = False) -> list[Suggestion]:
    """Return what a model can become with a share of its cache, the smallest cache first.

    The suggestions are every number of key/value heads that fits, and latents of the same caches and of the whole
    budget. The weights of a Hub model are downloaded.

    - `model`: a folder, `demo` or a Hub id.
    - `budget`: the share of the cache, 0 to 1.
    - `revision`: branch, tag or commit of a Hub id.
    - `allow_pickle`: whether .bin weights are read too.

    Raises:
        UsageError: nothing fits, the model has a latent already, or torch is not installed.
        CheckpointError: the model can't be found or read.
    """
    if not 0 < budget < 1:
        raise UsageError(f"--suggest {budget:.3g} is not a share of the cache.", "Give a share like 25%.")
    check_installed("torch", "--suggest")
    source = resolve(model, revision, allow_pickle)
    checkpoint = open_checkpoint(source.path, allow_pickle)
    plans = _plans(checkpoint, budget, model)
    check_classes(checkpoint, plans[0], model)  # what convert refuses gets no suggestions
    layers = sample(len(plans[0].before))
    found = [_suggestion(checkpoint, plan, layers) for plan in plans]
    return sorted(found, key=lambda each: (each.cache_bytes_per_token, each.target))


def sample(layers: int, most: int = SAMPLE) -> tuple[int, ...]:
    """Return at most `most` layers, evenly spaced, the first and the last among them."""
    if layers <= most:
        return tuple(range(layers))
    return tuple(round(number * (layers - 1) / (most - 1)) for number in range(most))


def _plans(checkpoint: Checkpoint, budget: float, name: str) -> list[Plan]:
    """Return a plan of everything that fits and that a class holds."""
    source = describe_checkpoint(checkpoint, name)
    pooled = bool(source.why_pool_only)
    before = source.attention
    if before[0].kind == "mla":
        raise UsageError(f"{name} has a latent already.", "Inspect the model that it was made from.")
    heads = before[0].num_key_value_heads
    method = "mean" if pooled else "svd"
    fewer = [request for request in head_requests(heads, method) if (request.groups or 1) <= budget * heads]
    shares = {(request.groups or 1) / heads for request in fewer} | {budget}
    plans = []
    for request in (*fewer, *latent_requests(sorted(shares))):
        try:
            plan = make_plan(checkpoint, request, name)
        except UsageError:
            continue
        if plan.cache_after <= budget * plan.cache_before:
            plans.append(plan)
    if not plans:
        raise UsageError(
            f"Nothing that {name} can become keeps at most {100 * budget:.3g}% of its cache.",
            f"uptrain inspect {typed(name)} lists what it can become.",
        )
    return plans


def _suggestion(checkpoint: Checkpoint, plan: Plan, layers: tuple[int, ...]) -> Suggestion:
    request, groups = plan.request, plan.after[0].num_key_value_heads
    if not request.chosen_method.mixes_dims:
        shares = [_pooled(checkpoint, plan, layer, groups) for layer in layers]
    else:
        maker = LayerMaker(checkpoint, plan)
        for layer in layers:
            maker.make(layer)
        shares = [(kept["svd"]["keys"], kept["svd"]["values"]) for kept in maker.energy.values()]
    keys, values = (sum(each) / len(shares) for each in zip(*shares, strict=True))
    return Suggestion(
        target=request.target,
        options=_options_of(plan),
        method=request.method,
        cache_bytes_per_token=plan.cache_after,
        cache=plan.cache_after / plan.cache_before,
        keys=keys,
        values=values,
        layers=tuple(dict.fromkeys(layer // len(plan.source.family.attentions) for layer in layers)),
        host=plan.holder,
    )


def _options_of(plan: Plan) -> str:
    """Return the options of `uptrain convert` that make what a plan makes."""
    request, spec = plan.request, plan.after[0]
    words = f"--to {request.target}"
    if request.kind.latent:
        words += f" --kv-lora-rank {spec.kv_lora_rank}"
        return words + (f" --qk-rope-head-dim {spec.qk_rope_head_dim}" if spec.qk_rope_head_dim else "")
    words += f" --groups {spec.num_key_value_heads}" if request.kind.takes_groups else ""
    return f"{words} --method {request.method}"


def _pooled(checkpoint: Checkpoint, plan: Plan, layer: int, groups: int) -> tuple[float, float]:
    base = plan.source.attention_name(layer)
    heads = read_layer(checkpoint, plan.source.family.projections, plan.before[layer], base, frozenset("kv"))
    keys, values = (energy_numpy.explained_by_mean(energy_numpy.rows_of(heads.part(part)), groups) for part in "kv")
    return keys, values
