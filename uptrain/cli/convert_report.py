"""Lay results out for people, or as JSON for programs; printing itself is the console's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from uptrain.architectures.attention import cross_bytes_per_token
from uptrain.architectures.model_class import is_language_model
from uptrain.checkpoint.sidecars import short
from uptrain.cli import console
from uptrain.cli.console import size
from uptrain.formatting import typed

if TYPE_CHECKING:
    from uptrain.checkpoint.sidecars import Sidecars
    from uptrain.checkpoint.source import Source
    from uptrain.conversion.inspection import Inspection
    from uptrain.conversion.plan.mla import LatentPlan
    from uptrain.conversion.plan.planner import Plan
    from uptrain.conversion.run.convert import Conversion
    from uptrain.conversion.suggestion import Suggestion

EXPANDED = "{} caches a copy for every query head; memory is saved by engines that cache the heads themselves"
CROSS = "{} of that, for each token that the encoder read; the rest for each token of the decoder's"


def inspection(found: Inspection, as_json: bool) -> None:
    """Show an inspection."""
    if as_json:
        console.result_json(found.to_dict())
        return
    rope = ", ".join(f"{key} {value}" for key, value in found.rope.items())
    window = f"{found.sliding_window} tokens in {found.sliding_layers} of {found.num_hidden_layers} layers"
    inside = f" in a {found.wrapped_in}" if found.wrapped_in else ""
    kinds = {"mha": "MHA", "gqa": "GQA", "mqa": "MQA", "mla": "MLA"}
    console.facts(
        found.name,
        [
            ("source", found.origin),
            ("family", f"{found.model_type}{inside}, {kinds[found.attention]}, {found.num_hidden_layers} layers"),
            (
                "heads",
                f"num_attention_heads {found.num_attention_heads}, num_key_value_heads "
                f"{found.num_key_value_heads}, head_dim {found.head_dim}, hidden_size {found.hidden_size}",
            ),
            *(
                [("latent", f"kv_lora_rank {found.kv_lora_rank}, qk_rope_head_dim {found.qk_rope_head_dim}")]
                if found.kv_lora_rank
                else []
            ),
            ("position", found.position + (f" ({rope})" if rope else "")),
            ("sliding window", window if found.sliding_window else "none"),
            ("attention biases", found.biases),
            ("weights", f"{found.parameters:,} parameters, {found.dtype}, {size(found.weight_bytes)}"),
            *([("quantised", found.quantised)] if found.quantised else []),
            ("shards", str(found.shards)),
            ("cache", f"{size(found.cache_bytes_per_token)} per token"),
            *_cross(found.cross_bytes_per_token),
            *([("in transformers", EXPANDED.format("its class"))] if found.cache_expanded else []),
            *((f"  at {context // 1024} K", size(count)) for context, count in found.cache_bytes.items()),
        ],
    )
    if found.unreadable:
        console.result(found.unreadable)
        return
    if not found.options:
        kept = "a latent" if found.kv_lora_rank else "one key/value head"
        console.result(f"It keeps {kept} already: there is nothing left to share.")
        return
    rows = [
        (
            f"--to {option.target}"
            + (f" --groups {option.num_key_value_heads}" if option.target == "gqa" else "")
            + (f" --cache {option.cache:.0%}" if option.cache else ""),
            size(option.cache_bytes_per_token),
            f"{option.cache_bytes_per_token / found.cache_bytes_per_token:.1%}",
            option.host,
            "yes" if option.remote_code else "no",
        )
        for option in found.options
    ]
    console.table("Can become", ("convert", "cache/token", "kept", "class", "remote code"), rows)


def _cross(count: int) -> list[tuple[str, str]]:
    return [("cross-attention", CROSS.format(size(count)))] if count else []


def suggestions(found: Inspection, suggested: list[Suggestion], as_json: bool) -> None:
    """Show what fits a cache budget, the smallest cache first."""
    if as_json:
        console.result_json({**found.to_dict(), "suggestions": [each.to_dict() for each in suggested]})
        return
    rows = [
        (each.options, size(each.cache_bytes_per_token), f"{each.cache:.1%}", f"{each.keys:.1%}", f"{each.values:.1%}")
        for each in suggested
    ]
    console.table(f"What {found.name} can become", ("convert", "cache/token", "of it", "keys", "values"), rows)
    layers = ", ".join(map(str, suggested[0].layers))
    console.note(
        f"keys, values: energy kept before any training, the mean of layers {layers}, without text. "
        "--calibrate TEXT weighs it by what text makes each layer use."
    )
    # The same cache can be had in several forms: what keeps most of its weaker side is the one to try.
    best = max(suggested, key=lambda each: min(each.keys, each.values))
    console.note(f"Keeps most: uptrain convert {typed(found.name)} {best.options}")


def _plan_facts(plan: Plan) -> dict[str, Any]:
    return {
        "model_type": plan.source.family.model_type,
        "host": plan.holder,
        "remote_code": bool(plan.host.remote_code),
        "num_attention_heads": plan.before[0].num_attention_heads,
        "num_key_value_heads": {
            "before": plan.before[0].num_key_value_heads,
            "after": plan.after[0].num_key_value_heads,
        },
        **(_latent_json(plan) if plan.latent else {}),
        "cache_bytes_per_token": {"before": plan.cache_before, "after": plan.cache_after},
        "tensors": sum(len(shard) for shard in plan.shards.values()),
        "changed_tensors": plan.changed,
        "shards": {name: sum(t.info.nbytes for t in tensors) for name, tensors in plan.shards.items()},
        "total_bytes": plan.total_bytes,
        "peak_memory_bytes": plan.peak_memory,
        "digest": plan.digest,
    }


def dry_run(source: Source, plan: Plan, beside: Sidecars, out: Path, as_json: bool) -> None:
    """Show a plan that isn't run, and which files beside the weights it would take along."""
    if as_json:
        facts = {"source": source.describe(), "out": str(out), **_plan_facts(plan)}
        console.result_json({**facts, **beside.to_dict(), "notes": list(plan.notes)})
        return
    for note in plan.notes:
        console.note(note)
    console.facts(
        f"{source.name} → {out} (dry run: nothing is written)",
        [
            ("source", source.describe()),
            ("method", f"{plan.request.method} on {sum(not spec.cross for spec in plan.after)} layers"),
            *_shared_facts(plan),
            ("tensors", f"{sum(map(len, plan.shards.values()))}, of which {plan.changed} change"),
            ("disk", f"{size(plan.total_bytes)} in {len(plan.shards)} shard(s)"),
            ("memory", f"about {size(plan.peak_memory)} a thread above the interpreter's own"),
            ("goes along", short(beside.along) or "nothing"),
            *_left_out(beside),
        ],
    )


def _left_out(beside: Sidecars) -> list[tuple[str, str]]:
    return [("left out", beside.summary())] if beside.left else []


def _shared_facts(plan: Plan) -> list[tuple[str, str]]:
    before, after = plan.before[0].num_key_value_heads, plan.after[0].num_key_value_heads
    if plan.latent is not None:
        return [*_latent_facts(plan, plan.latent), *_class_facts(plan)]
    return [
        ("key/value heads", f"{before} → {after} for {plan.before[0].num_attention_heads} query heads"),
        *_class_facts(plan),
    ]


def _latent_json(plan: Plan) -> dict[str, Any]:
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    return {name: getattr(plan.after[0], name) for name in names}


def _latent_facts(plan: Plan, latent: LatentPlan) -> list[tuple[str, str]]:
    spec = plan.after[0]
    beside = f" beside {spec.qk_rope_head_dim} rotary ones" if spec.qk_rope_head_dim else ""
    heads = f"{plan.before[0].num_key_value_heads} key/value heads"
    facts = [("latent", f"{heads} → {spec.kv_lora_rank} values{beside}, a token and layer")]
    if latent.target.form == "re-rotate":
        facts.append(("decoding", "every step expands and rotates the whole context again"))
    if latent.target.form == "longrope":
        facts.append(("rotary table", "the model's own; vLLM and llama.cpp can't express it, transformers can"))
    if plan.copied_head:
        facts.append(("head", "a copy of the embedding: vLLM's class does not tie them"))
    if latent.alpha != 1:
        facts.append(("residual stream", f"scaled by {latent.alpha:.4f}, so that rms_norm_eps 1e-6 changes no norm"))
    return facts


def _class_facts(plan: Plan) -> list[tuple[str, str]]:
    kept = plan.cache_after / plan.cache_before
    expanded = plan.result.expands_cache
    code = " (ships its own modelling file: load with trust_remote_code=True)" if plan.host.remote_code else ""
    return [
        ("cache", f"{size(plan.cache_before)} → {size(plan.cache_after)} per token, {kept:.1%} kept"),
        *_cross_facts(plan),
        *([("in transformers", EXPANDED.format(plan.host.architecture.class_name))] if expanded else []),
        ("class", f"{plan.holder} · {plan.host.architecture.class_name}{code}"),
    ]


def _cross_facts(plan: Plan) -> list[tuple[str, str]]:
    before, after = (cross_bytes_per_token(layers, plan.itemsize) for layers in (plan.before, plan.after))
    if not before:
        return []
    return [("cross-attention", CROSS.format(f"{size(before)} → {size(after)}")), ("encoder", "left as it is")]


def conversion(done: Conversion, as_json: bool) -> None:
    """Show a finished conversion, the energy it kept, and what to type next."""
    if as_json:
        extra = {"out": str(done.out), "resumed": list(done.resumed), "energy_kept": done.kept}
        console.result_json({**extra, **_plan_facts(done.plan), **done.sidecars.to_dict()})
        return
    pairs = _shared_facts(done.plan)
    if done.resumed:
        pairs.append(("resumed", f"{len(done.resumed)} shard(s) of an earlier run kept"))
    pairs += _left_out(done.sidecars)
    method, place = done.plan.request.method, done.plan.source.family.place
    if len(done.kept) > 1:
        methods = list(next(iter(done.kept.values())))
        rows = [(place(layer), *_shares(kept, *methods)) for layer, kept in done.kept.items()]
        rows.append(("all", *_shares(_average(list(done.kept.values())), *methods)))
        columns = ("layer", *(text for name in methods for text in (f"{name}: keys", "values")))
        title = "Energy kept" if done.plan.latent else "Energy kept, by method"
        console.table(title, columns, rows)
    console.facts(f"Wrote {done.out}", pairs)
    if method == "mean" and len(done.kept) == 1:
        (layer, kept), *_ = done.kept.items()
        ours, better = kept["mean"], kept["svd"]
        console.note(
            f"In layer {place(layer)}, mean keeps about {ours['keys']:.0%} of key and {ours['values']:.0%} of value "
            f"energy; --method svd would keep {better['keys']:.0%} and {better['values']:.0%}. "
            "--diagnose measures every layer."
            # Energy alone is no guide where each frequency has one slot: text must say which components matter.
            + (" Rotary keys want --calibrate TEXT." if _wants_text(done.plan) else "")
        )
    if done.plan.source.tower is not None:
        loader = done.plan.source.tower.wrapper.auto_class
        console.note(f"Load it with transformers.{loader}: uptrain can't evaluate or train wrappers yet.")
    elif is_language_model(done.plan.config):
        trusted = " --allow-pickle" if done.source.allow_pickle else ""
        console.note(f"Next: uptrain eval {typed(done.out)} --baseline {typed(done.source.name)}{trusted}")


def _wants_text(plan: Plan) -> bool:
    rotary = plan.source.position.rotates
    return rotary and not plan.source.family.uncalibrated


def _shares(kept: dict[str, dict[str, float]], *methods: str) -> list[str]:
    return [f"{kept[method][side]:.1%}" for method in methods for side in ("keys", "values")]


def _average(layers: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        method: {side: sum(kept[method][side] for kept in layers) / len(layers) for side in ("keys", "values")}
        for method in layers[0]
    }
