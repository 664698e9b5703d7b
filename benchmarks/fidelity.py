"""Tabulate what each method costs in quality before any training: model x target x method.

    python -m benchmarks fidelity --model demo
    python -m benchmarks fidelity --model demo --to mla --kv-lora-rank 256,128,64,32
    python -m benchmarks fidelity --model SMOLLM2 --to mqa --methods mean,svd,calibrated --text TEST --calibrate VALID

Fixed settings: blocks of 1,024 tokens (or the model's own limit), each scored whole and apart, the first --blocks of
the text; perplexity, KL(original || converted) in nats per token and top-1 agreement, in fp32. Poolings that uptrain
does not offer (mean renormed, Procrustes) are computed in the source's own class, its heads repeated. Writes JSON and
a plot of quality against the share of the cache that is kept.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks import baselines
from benchmarks.common import options, peak_memory, settings_of, timed, write_json
from uptrain.architectures.description import describe_checkpoint
from uptrain.architectures.projections import read_layer
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.checkpoint.source import resolve
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.data.documents import pieces
from uptrain.data.sources import parse_source
from uptrain.methods.head_conversion import maps_of, rotary_of
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.registry import METHODS, TARGETS
from uptrain.models.register import register

BASELINES = ("renormed", "procrustes", "procrustes-renormed")


@dataclass(frozen=True)
class Row:
    """One converted model's figures; `cache` is the share of the source's cache that is kept."""

    target: str
    method: str
    cache: float
    perplexity: float
    ratio: float
    kl: float
    top1_agreement: float
    seconds: float
    peak_rss_mb: int


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def token_blocks(folder: Path, text: str, count: int, length: int) -> torch.Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Published figures are on "\n"; a file may have come by way of "\r\n".
    whole = "".join(piece.text for piece in pieces([parse_source(text)])).replace("\r\n", "\n")
    ids = tokenizer(whole[: count * length * 12], return_tensors="pt", verbose=False).input_ids[0]
    count = min(count, len(ids) // length)
    return ids[: count * length].view(count, length)


@torch.no_grad()
def log_probabilities(model: Any, block: torch.Tensor) -> torch.Tensor:
    return functional.log_softmax(model(block[None], use_cache=False).logits[0, :-1].float(), dim=-1)


def score(model: Any, original: Any, blocks: torch.Tensor) -> tuple[float, float, float]:
    """Return perplexity, KL and top-1 agreement over all tokens that have a successor."""
    loss = kl = agreed = 0.0
    for block in blocks:
        ours, theirs = log_probabilities(model, block), log_probabilities(original, block)
        loss -= float(ours.gather(1, block[1:, None]).sum(dtype=torch.float64))
        kl += float((theirs.exp() * (theirs - ours)).sum(dtype=torch.float64))
        agreed += float((ours.argmax(1) == theirs.argmax(1)).sum())
    tokens = blocks.shape[0] * (blocks.shape[1] - 1)
    return math.exp(loss / tokens), kl / tokens, agreed / tokens


@torch.no_grad()
def pool_in_place(folder: Path, groups: int, method: str) -> Any:
    """Return the source's own class with its heads pooled by a baseline and repeated."""
    model, checkpoint = load(folder), open_checkpoint(folder)
    source = describe_checkpoint(checkpoint, str(folder))
    projections = source.family.projections
    for number, spec in enumerate(source.attention):
        base = source.attention_name(number)
        maps = maps_of(read_layer(checkpoint, projections, spec, base))
        position = rotary_of(source.family.position, spec)
        if method == "renormed":
            pooled = baselines.mean_renormed(maps, groups, None)
        else:
            pooled = baselines.procrustes(maps, groups, position, None, renorm=method.endswith("renormed"))
        write_heads(model.get_submodule(base.rstrip(".")), projections, pooled, spec.num_key_value_heads)
    return model


def write_heads(module: Any, projections: Any, maps: HeadMaps, heads: int) -> None:
    from uptrain.architectures.attention import AttentionSpec
    from uptrain.methods.head_conversion import ModuleWeights

    spec = AttentionSpec(maps.query_heads, heads, maps.k.shape[1])
    for name, value in ModuleWeights(projections, spec).parameters(maps).items():
        module.get_parameter(name).copy_(value)


def measure(arguments: argparse.Namespace) -> tuple[float, list[Row]]:
    register()
    source = resolve(arguments.model)
    original = load(source.path)
    limit = getattr(original.config, "max_position_embeddings", 1024) or 1024
    blocks = token_blocks(source.path, arguments.text, arguments.blocks, min(1024, limit))
    base, _, _ = score(original, original, blocks)
    checkpoint = open_checkpoint(source.path)
    heads = describe_checkpoint(checkpoint, "source").attention[0]
    rows = []
    for target, shape in targets(arguments):
        for method in methods_for(arguments, target):
            with tempfile.TemporaryDirectory(dir=arguments.work) as work:
                with timed() as timer:
                    if method in BASELINES:
                        model = pool_in_place(source.path, shape.get("groups", 1), method)
                    else:
                        request = Request(method=method, **shape, **extra(arguments, method))
                        done = convert(arguments.model, Path(work) / "out", request)
                        cache = done.plan.cache_after / done.plan.cache_before
                        model = load(Path(work) / "out")
                perplexity, kl, agreement = score(model, original, blocks)
            peak = peak_memory() // 2**20
            if method in BASELINES:
                cache = shape.get("groups", 1) / heads.num_key_value_heads
            rows.append(
                Row(target, method, cache, perplexity, perplexity / base, kl, agreement, round(timer.seconds, 1), peak)
            )
            print(show(rows[-1]), flush=True)
    return base, rows


def targets(arguments: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Return each target's name and its part of the request."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name in arguments.to.split(","):
        if name == "mqa":
            found.append((name, {"target": "mqa"}))
        elif name != "mla":
            found.append((name, {"target": "gqa", "groups": int(name.removeprefix("gqa").strip(":-"))}))
        else:
            found += latents(arguments)
    return found


def latents(arguments: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Pair every --rope with every --kv-lora-rank; a rank RANK+DIMS names its own rotary dims too."""
    found = []
    for rope in arguments.rope.split(",") if arguments.rope else [None]:
        for text in arguments.kv_lora_rank.split(","):
            rank, _, dims = text.partition("+")
            sizes = {
                "kv_lora_rank": int(rank),
                "qk_rope_head_dim": int(dims) if dims and rope not in ("pre-rope", "re-rotate") else None,
            }
            found.append((f"mla-{text}{f'-{rope}' if rope else ''}", {"target": "mla", "rope": rope, **sizes}))
    return found


def methods_for(arguments: argparse.Namespace, target: str) -> list[str]:
    latent = target.startswith("mla")
    known = [
        *(method.name for method in METHODS.values() if method.serves(TARGETS["mla" if latent else "gqa"])),
        *(() if latent else BASELINES),
    ]
    return [name for name in (arguments.methods or ",".join(known)).split(",") if name in known]


def extra(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    if method == "calibrated":
        names = ("calibrate", "calibration_tokens", "repair_steps")
        return {name: getattr(arguments, name) for name in names}
    if arguments.grouping == "contiguous":
        return {}
    return {"grouping": arguments.grouping} if method in ("mean", "svd", "first") else {}


def show(row: Row) -> str:
    return (
        f"{row.target:18} {row.method:20} {row.cache:6.1%} {row.perplexity:12.3f} {row.ratio:9.3f}x "
        f"{row.kl:9.4f} {row.top1_agreement:7.1%} {row.seconds:8.1f} s"
    )


def plot(rows: list[Row], base: float, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for method in dict.fromkeys(row.method for row in rows):
        points = sorted((row.cache, row.perplexity) for row in rows if row.method == method)
        axes.plot(*zip(*points, strict=True), marker="o", label=method)
    axes.axhline(base, color="black", linewidth=1, linestyle=":", label="original")
    axes.set(xlabel="share of the cache kept", ylabel="perplexity, no training", xscale="log", yscale="log")
    ticks = sorted({row.cache for row in rows})
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks], minor=False)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    parser = options(
        "--model", "--calibrate", "--calibration-tokens", "--repair-steps", "--text", "--work", "--out",
        calibrate={"default": "builtin"},
        out={"default": Path("fidelity.json"), "help": "JSON; the plot gets the same name with .png"},
    )  # fmt: skip
    parser.add_argument("--to", default="gqa4,gqa2,mqa", help="targets: gqaN, mqa or mla, with commas")
    parser.add_argument("--methods", help="with commas (default: all that the target has)")
    parser.add_argument(
        "--kv-lora-rank", default="256,128,64,32", help="of --to mla: ranks, or RANK+ROTARY, with commas"
    )
    parser.add_argument(
        "--rope", help="of --to mla: decoupled, longrope, pre-rope, with commas (default: the model's own)"
    )
    parser.add_argument("--grouping", default="contiguous")
    parser.add_argument("--blocks", type=int, default=32)
    arguments = parser.parse_args()
    base, rows = measure(arguments)
    print(f"original {base:.3f}; {arguments.blocks} blocks of 1,024 tokens of {arguments.text}, fp32, no training")
    result = {"settings": settings_of(arguments), "original_perplexity": base, "rows": [asdict(row) for row in rows]}
    write_json(arguments.out, result)
    plot(rows, base, arguments.out.with_suffix(".png"))
