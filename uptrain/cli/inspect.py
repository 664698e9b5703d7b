"""`uptrain inspect`: its options, its call and the tables it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from uptrain.cli import console
from uptrain.cli.cache_rows import cross_attention, expanded_in_transformers
from uptrain.cli.options import examples, json_option, source_options
from uptrain.cli.types import Share
from uptrain.formatting import size, typed
from uptrain.methods.registry import TARGETS

if TYPE_CHECKING:
    from uptrain.conversion.inspection import Inspection
    from uptrain.conversion.suggestion import Suggestion


@click.command(
    epilog=examples(
        "uptrain inspect demo",
        "uptrain inspect demo --suggest 25%",
        "uptrain inspect ./llama --plot heads.png",
    )
)
@click.argument("model")
@source_options
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="OUT.png", help="Draw the similarity of the heads, and the "
    "singular values of all keys and of all values.",
)  # fmt: skip
@click.option(
    "--suggest", type=Share(), metavar="SHARE", help="List the targets whose cache is at most this share of today's, "
    "e.g. 25%, with the energy that each explains. Needs torch.",
)  # fmt: skip
@json_option
def inspect(
    model: str, revision: str | None, allow_pickle: bool, plot: Path | None, suggest: float | None, as_json: bool
) -> None:
    """Print what MODEL is, what its cache costs, and what it can become.

    Reads config.json and the headers of the weight files only, so a model of 70 B parameters takes no longer than a
    small one. --plot and --suggest also read the weights of a few layers.
    """
    from uptrain.conversion.inspection import inspect as run

    found = run(model, revision=revision, allow_pickle=allow_pickle)
    layers = None
    if plot is not None:
        from uptrain.publishing.page.head_maps import plot_heads

        layers = plot_heads(model, plot, revision=revision, allow_pickle=allow_pickle)
    if suggest is None:
        _show(found, as_json)
    else:
        from uptrain.conversion.suggestion import suggest as look

        _show_suggestions(found, look(model, suggest, revision=revision, allow_pickle=allow_pickle), as_json)
    if layers is not None:
        console.note(f"Drew layers {', '.join(map(str, layers))} to {plot}.")


def _show(found: Inspection, as_json: bool) -> None:
    """Print an inspection."""
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
            *([("quantized", found.quantised)] if found.quantised else []),
            ("shards", str(found.shards)),
            ("cache", f"{size(found.cache_bytes_per_token)} per token"),
            *([cross_attention(size(found.cross_bytes_per_token))] if found.cross_bytes_per_token else []),
            *([expanded_in_transformers("its class")] if found.cache_expanded else []),
            *((f"  at {context // 1024} K", size(count)) for context, count in found.cache_bytes.items()),
        ],
    )
    if found.unreadable:
        console.result(found.unreadable)
        return
    if not found.options:
        cached = "a latent" if found.kv_lora_rank else "one key/value head"
        console.result(f"It already caches {cached} per layer, so there is nothing to convert.")
        return
    rows = [
        (
            f"--to {option.target}"
            + (f" --groups {option.num_key_value_heads}" if TARGETS[option.target].takes_groups else "")
            + (f" --cache {option.cache:.0%}" if option.cache else ""),
            size(option.cache_bytes_per_token),
            f"{option.cache_bytes_per_token / found.cache_bytes_per_token:.1%}",
            option.host,
            "yes" if option.remote_code else "no",
        )
        for option in found.options
    ]
    console.table("Can become", ("convert", "cache/token", "share", "class", "remote code"), rows)


def _show_suggestions(found: Inspection, suggested: list[Suggestion], as_json: bool) -> None:
    """Print the targets that fit a cache budget, the smallest cache first."""
    if as_json:
        console.result_json({**found.to_dict(), "suggestions": [each.to_dict() for each in suggested]})
        return
    rows = [
        (each.options, size(each.cache_bytes_per_token), f"{each.cache:.1%}", f"{each.keys:.1%}", f"{each.values:.1%}")
        for each in suggested
    ]
    console.table(f"What {found.name} can become", ("convert", "cache/token", "share", "keys", "values"), rows)
    layers = ", ".join(map(str, suggested[0].layers))
    console.note(
        f"keys, values: explained energy before training, the mean of layers {layers}, without text. "
        "--calibrate TEXT weighs it by the activations of each layer on a text."
    )
    # Targets of the same cache differ in the energy they explain. The weaker of keys and values decides.
    best = max(suggested, key=lambda each: min(each.keys, each.values))
    console.note(f"Explains most: uptrain convert {typed(found.name)} {best.options}")
