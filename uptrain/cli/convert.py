"""`uptrain convert`: its options, its call, and the plan and the result it prints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uptrain.architectures.attention import cross_bytes_per_token
from uptrain.architectures.model_class import is_language_model
from uptrain.checkpoint.sidecars import short
from uptrain.cli import console
from uptrain.cli.cache_rows import cross_attention, expanded_in_transformers
from uptrain.cli.healing import heal, planned_healing
from uptrain.cli.method_help import grouping_help, method_help, seed_help
from uptrain.cli.options import (
    Command,
    calibration_text_options,
    check_device,
    device_option,
    examples,
    json_option,
    source_options,
)
from uptrain.cli.types import Share, Size
from uptrain.errors import UsageError
from uptrain.formatting import counted, size, typed

if TYPE_CHECKING:
    from uptrain.checkpoint.sidecars import Sidecars
    from uptrain.checkpoint.source import Source
    from uptrain.conversion.plan.mla import MLAPlan
    from uptrain.conversion.plan.planner import Plan
    from uptrain.conversion.run.convert import Conversion

_LATENT_OPTIONS = (
    click.option("--cache", type=Share(), help="(--to mla) Share of MODEL's cache to keep, e.g. 25%."),
    click.option("--kv-lora-rank", type=int, help="(--to mla) Width of the latent, in values per token and layer. "
                 "Replaces --cache."),
    click.option("--qk-rope-head-dim", type=int, help="(--to mla) Width of the rotary key that all heads share, in "
                 "values per token and layer."),
    click.option(
        "--rope",
        help="(--to mla) How keys encode positions. decoupled (default): the fastest rope pairs in one shared rotary "
        "key; stock deepseek_v3, any engine. longrope: the rope pairs that cost most when unrotated; transformers "
        "only. pre-rope: all keys in the latent, rotated when they are read; own class, every step expands the whole "
        "context.",
    ),
    click.option("--q-lora-rank", type=int, help="(--to mla) Rank of the query projection. Default: full."),
    click.option(
        "--engine",
        default="any",
        show_default=True,
        help="(--to mla) any (transformers and vLLM) or llama.cpp, which requires a query projection in two factors.",
    ),
    click.option("--key-weight", type=float, help="(--to mla) Weight of key error relative to value error. "
                 "Default: best of 1, 4 and 16."),
)  # fmt: skip


def _latent_options(command: Command) -> Command:
    for option in reversed(_LATENT_OPTIONS):
        command = option(command)
    return command


@click.command(
    epilog=examples(
        "uptrain convert demo --to gqa --groups 4",
        "uptrain convert demo --to mqa --method svd",
        "uptrain convert ./llama --to mqa --calibrate text.txt",
        "uptrain convert ./llama --to mqa --calibrate text.txt --repair blocks --heal 65536",
        "uptrain convert demo --to mla --cache 25%",
        "uptrain convert ./llama --to mla --kv-lora-rank 512 --calibrate text.txt",
        "uptrain convert ./llama-2-7b ./llama-2-7b-mqa --to mqa --max-shard-size 5GB",
        "uptrain convert org/llama --to gqa --groups 8 --dry-run",
    )
)
@click.argument("model")
@click.argument("out", required=False)
@click.option("--to", "target", default="gqa", show_default=True, help="Target attention: gqa, mqa or mla.")
@click.option("--groups", type=int, help="(--to gqa) Number of key/value heads to keep. Must divide MODEL's number of "
              "attention heads.")  # fmt: skip
@_latent_options
@click.option("--method", help=method_help())
@click.option("--grouping", default="contiguous", show_default=True, help=grouping_help())
@click.option("--seed", type=int, help=seed_help())
@calibration_text_options("--method calibrated")
@click.option(
    "--repair", help="(--method calibrated) What gradient steps may change. attention (default), or blocks: each "
    "layer's norms and MLP too, so that more of OUT differs from MODEL.",
)  # fmt: skip
@click.option(
    "--repair-steps", type=int, help="(--method calibrated) Gradient steps per layer that refit attention; 0 for none. "
    "Default: --quality's.",
)  # fmt: skip
@click.option(
    "--heal", metavar="TOKENS", type=int, help="(--method calibrated) Then train the whole result for so many tokens "
    "of the calibration text, to predict what MODEL predicts. OUT is the healed model.",
)  # fmt: skip
@click.option(
    "--memory", type=Size(), help="(--method calibrated) Memory for activations. What does not fit is written to files "
    "next to OUT. Default: 4GiB.",
)  # fmt: skip
@device_option
@click.option("--dtype", help="Dtype of the stored weights: bfloat16, float16, float32 or float64. Default: that of "
              "MODEL.")  # fmt: skip
@click.option(
    "--allow-nonfinite", is_flag=True, help="Accept NaN and infinite values in MODEL's weights. In attention weights "
    "this requires --method mean or first.",
)  # fmt: skip
@click.option("--max-shard-size", type=Size(), help="Largest weight file, e.g. 5GB. Default: the files of MODEL.")
@source_options
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists. The old OUT stays until the new one is "
              "complete.")  # fmt: skip
@click.option(
    "--join", is_flag=True, help="Share the work with all processes that run the same command, on this machine or on "
    "others that see the same OUT.",
)  # fmt: skip
@click.option(
    "--diagnose", is_flag=True, help="Also measure every layer: the explained energy of each method, and the "
    "similarity of the heads that now share one.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print what would be written, and write nothing.")
@json_option
def convert(model: str, out: str | None, **options: Any) -> None:
    """Convert MODEL to fewer key/value heads, or to a latent, and write the result to OUT.

    OUT is a new folder. Default: ./NAME-gqa4, ./NAME-mqa or ./NAME-mla128, named after MODEL and the target. It
    appears only when it is complete.

    Weights are read layer by layer, so memory does not grow with the number of layers. To resume an interrupted
    conversion, repeat the same command.
    """
    from uptrain.checkpoint.events import Events
    from uptrain.conversion.request import Request
    from uptrain.conversion.run.convert import run_plan
    from uptrain.conversion.run.options import RunOptions
    from uptrain.conversion.run.prepare import default_out, plan_conversion, sidecars

    names = (
        "target", "groups", "grouping", "seed", "dtype", "max_shard_size", "calibrate", "quality", "calibration_tokens",
        "calibration_block", "repair", "repair_steps", "cache", "kv_lora_rank", "qk_rope_head_dim", "rope",
        "q_lora_rank", "engine", "key_weight", "allow_nonfinite",
    )  # fmt: skip
    method = options["method"] or ("auto" if options["calibrate"] is None else "calibrated")
    request = Request(method=method, **{name: options[name] for name in names})
    if options["dry_run"] and options["diagnose"]:
        raise UsageError("--diagnose has no effect with --dry-run.", "Leave one of them out.")
    running = RunOptions(join=options["join"], diagnose=options["diagnose"], memory=options["memory"])
    running.check(request)
    check_device(request.chosen_method.needs_text)
    planned = plan_conversion(
        model,
        request,
        revision=options["revision"],
        allow_pickle=options["allow_pickle"],
        dry=options["dry_run"],
    )
    source, checkpoint, plan = planned
    folder = Path(out) if out else default_out(source, plan)
    overwrite, tokens = options["overwrite"], options["heal"]
    healing = None if tokens is None else planned_healing(planned, folder, tokens, overwrite, running)
    if options["dry_run"]:
        _show_plan(source, plan, sidecars(source, checkpoint, dry=True), folder, options["as_json"])
        return
    if healing is not None:
        healing.check()
    console.note(f"Reading {source.describe()}")
    with console.bytes_progress("Converting", plan.total_bytes) as advance:
        events = Events(bytes=advance, layer=console.layer_progress(), note=console.note)
        if healing is not None:
            done = healing.convert(events)
        else:
            done = run_plan(planned, folder, overwrite=overwrite, options=running, events=events)
    facts = [] if healing is None else heal(healing)
    _show(replace(done, out=folder), options["as_json"], facts)


def _plan_facts(plan: Plan) -> dict[str, Any]:
    return {
        "model_type": plan.source.family.model_type,
        "host": plan.holder,
        "remote_code": bool(plan.target.remote_code),
        "num_attention_heads": plan.before[0].num_attention_heads,
        "num_key_value_heads": {
            "before": plan.before[0].num_key_value_heads,
            "after": plan.after[0].num_key_value_heads,
        },
        **plan.attention.sizes,
        "cache_bytes_per_token": {"before": plan.cache_before, "after": plan.cache_after},
        "tensors": sum(len(shard) for shard in plan.shards.values()),
        "changed_tensors": plan.changed,
        "shards": {name: sum(each.output.nbytes for each in operations) for name, operations in plan.shards.items()},
        "total_bytes": plan.total_bytes,
        "peak_memory_bytes": plan.peak_memory,
        "digest": plan.digest,
    }


def _show_plan(source: Source, plan: Plan, files: Sidecars, out: Path, as_json: bool) -> None:
    """Print a plan that is not run, and the files that it would copy.

    - `source`: the checkpoint that would be converted.
    - `plan`: what would be written.
    - `files`: the files other than weights: copied, and left out.
    - `out`: the folder that would be written.
    - `as_json`: print JSON instead of text.
    """
    if as_json:
        facts = {"source": source.describe(), "out": str(out), **_plan_facts(plan)}
        console.result_json({**facts, **files.to_dict(), "notes": list(plan.notes)})
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
            ("disk", f"{size(plan.total_bytes)} in {counted(len(plan.shards), 'shard')}"),
            ("memory", f"about {size(plan.peak_memory)} per thread, in addition to the interpreter's"),
            ("copied files", short(files.copied) or "none"),
            *_left_out(files),
        ],
    )


def _left_out(files: Sidecars) -> list[tuple[str, str]]:
    return [("left out", files.summary())] if files.left_out else []


def _shared_facts(plan: Plan) -> list[tuple[str, str]]:
    from uptrain.conversion.plan.mla import MLAPlan

    if isinstance(plan.attention, MLAPlan):
        return [*_latent_facts(plan, plan.attention), *_class_facts(plan)]
    before, after = plan.before[0].num_key_value_heads, plan.after[0].num_key_value_heads
    return [
        ("key/value heads", f"{before} → {after} for {plan.before[0].num_attention_heads} query heads"),
        *_class_facts(plan),
    ]


def _latent_facts(plan: Plan, latent: MLAPlan) -> list[tuple[str, str]]:
    spec = plan.after[0]
    rotary = f" and a rotary key of {spec.qk_rope_head_dim}" if spec.qk_rope_head_dim else ""
    heads = f"{plan.before[0].num_key_value_heads} key/value heads"
    facts = [("latent", f"{heads} → a latent of {spec.kv_lora_rank} values{rotary}, per token and layer")]
    if latent.spec.rope.rotates_expanded:
        facts.append(("decoding", "every step expands and rotates the whole context"))
    if latent.spec.rope.chooses_pairs:
        facts.append(("rotary table", "the model's own inverse frequencies, which only transformers supports"))
    if plan.copied_head:
        facts.append(("head", "a copy of the embedding, because vLLM's class does not tie them"))
    if latent.alpha != 1:
        facts.append(("residual stream", f"scaled by {latent.alpha:.4f}: norms with rms_norm_eps 1e-6 stay exact"))
    return facts


def _class_facts(plan: Plan) -> list[tuple[str, str]]:
    share = plan.cache_after / plan.cache_before
    expanded = plan.result.expands_cache
    code = " (with its own modelling code: load with trust_remote_code=True)" if plan.target.remote_code else ""
    return [
        ("cache", f"{size(plan.cache_before)} → {size(plan.cache_after)} per token ({share:.1%})"),
        *_cross_facts(plan),
        *([expanded_in_transformers(plan.target.family.class_name)] if expanded else []),
        ("class", f"{plan.holder} · {plan.target.family.class_name}{code}"),
    ]


def _cross_facts(plan: Plan) -> list[tuple[str, str]]:
    before, after = (cross_bytes_per_token(layers, plan.itemsize) for layers in (plan.before, plan.after))
    if not before:
        return []
    return [cross_attention(f"{size(before)} → {size(after)}"), ("encoder", "unchanged")]


def _show(done: Conversion, as_json: bool, healed: list[tuple[str, str]]) -> None:
    """Print a finished conversion, its explained energy, what healing it did, and the next command."""
    if as_json:
        extra = {"out": str(done.out), "resumed": list(done.resumed), "energy_kept": done.energy}
        console.result_json({**extra, **_plan_facts(done.plan), **done.sidecars.to_dict()})
        return
    pairs = [*_shared_facts(done.plan), *healed]
    if done.resumed:
        pairs.append(("resumed", f"{counted(len(done.resumed), 'shard')} of an earlier run"))
    pairs += _left_out(done.sidecars)
    method, place = done.plan.request.method, done.plan.source.family.place
    if len(done.energy) > 1:
        methods = list(next(iter(done.energy.values())))
        rows = [(place(layer), *_shares(explained, *methods)) for layer, explained in done.energy.items()]
        rows.append(("all", *_shares(_average(list(done.energy.values())), *methods)))
        columns = ("layer", *(text for name in methods for text in (f"{name}: keys", "values")))
        title = "Explained energy" if done.plan.attention.sizes else "Explained energy, by method"
        console.table(title, columns, rows)
        if any(share < 0 for methods in done.energy.values() for sides in methods.values() for share in sides.values()):
            console.note("Below 0 %: the error is larger than the keys or values themselves.")
    console.facts(f"Wrote {done.out}", pairs)
    if method == "mean" and len(done.energy) == 1:
        (layer, explained), *_ = done.energy.items()
        ours, better = explained["mean"], explained["svd"]
        console.note(
            f"In layer {place(layer)}, mean explains about {ours['keys']:.0%} of the energy of keys and "
            f"{ours['values']:.0%} of the energy of values; --method svd would explain {better['keys']:.0%} and "
            f"{better['values']:.0%}. --diagnose measures every layer."
            # A shared rotary key has one component per rope pair. Only text says which components matter.
            + (" For rotary keys, add --calibrate TEXT." if _wants_text(done.plan) else "")
        )
    if done.plan.source.tower is not None:
        loader = done.plan.source.tower.wrapper.auto_class
        console.note(f"Load it with transformers.{loader}. uptrain can't evaluate or train such a wrapper yet.")
    elif is_language_model(done.plan.config):
        trusted = " --allow-pickle" if done.source.allow_pickle else ""
        console.note(f"Next: uptrain eval {typed(done.out)} --baseline {typed(done.source.name)}{trusted}")


def _wants_text(plan: Plan) -> bool:
    rotary = plan.source.position.rotates
    return rotary and not plan.source.family.uncalibrated


def _shares(explained: dict[str, dict[str, float]], *methods: str) -> list[str]:
    return [f"{explained[method][side]:.1%}" for method in methods for side in ("keys", "values")]


def _average(layers: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        method: {side: sum(layer[method][side] for layer in layers) / len(layers) for side in ("keys", "values")}
        for method in layers[0]
    }
