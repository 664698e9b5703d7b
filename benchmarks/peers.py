"""Compare uptrain with other tools' installed packages: same checkpoint, text, tokens and cache budget, in one run.

    python -m venv peers && peers/bin/pip install cacheshrink spectral-kv
    python -m benchmarks peers --model demo --peer-python peers/bin/python
    python -m benchmarks peers --model SMOLLM2 --text TEST --calibrate VALID --share 1/3 --peer-python peers/bin/python

Each tool converts or compresses by its own package, in a process of its own, calibrated on the same texts; the same
function scores all, in fp32, without training: perplexity, KL from the original in nats per token, top-1 agreement. The
share of the cache is counted in the tensors that a model caches, whatever its tool promises. A tool that fails has a
row with its error's last line. Tools that no package registry has are listed with the figures that they published.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import options, settings_of, table, timed, write_json
from benchmarks.fidelity import token_blocks
from benchmarks.peer_models import cached_values, load, score
from uptrain.checkpoint.source import resolve
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import UptrainError
from uptrain.models.register import register

TEXT_TOKENS = 512
"""Tokens of a calibration text."""

PEERS = (
    ("cacheshrink", "separate"), ("cacheshrink", "separate+rotary"), ("cacheshrink", "joint"),
    ("cacheshrink", "joint+rotary"), ("cacheshrink", "xkv+rotary"), ("spectral-kv", "default"),
)  # fmt: skip
"""Each tool and its method; +rotary: with the rotary base given by hand, because the tool doesn't find it."""

PUBLISHED = (
    ("TransMLA", "NeurIPS 2025", "Llama-2-7B", "512+64 values per token", "WikiText-2 perplexity", "5.47", "41.6"),
    ("TransMLA", "NeurIPS 2025", "Llama-3-8B", "512+64 values per token", "WikiText-2 perplexity", "6.14", "25.8"),
    ("TransMLA", "NeurIPS 2025", "Mistral-7B", "512+64 values per token", "WikiText-2 perplexity", "5.32", "9.58"),
    ("TransMLA", "NeurIPS 2025", "Qwen2.5-7B", "512+64 values per token", "WikiText-2 perplexity", "6.85", "8.41"),
    ("CARE-U", "ICLR 2026", "Llama-3.1-8B-Instruct", "rank 256 per matrix", "perplexity", "7.21", "48.4"),
    ("Palu", "CARE's run of it", "Llama-3.1-8B-Instruct", "rank 256 per matrix", "perplexity", "7.21", "538"),
    ("MHA2MLA", "CARE's run of it", "Llama-3.1-8B-Instruct", "rank 256 per matrix", "perplexity", "7.21", "1634"),
    ("MHA2MLA, trained", "ACL 2025", "SmolLM-135M", "31.25 % of the cache", "mean of tasks, %", "44.50", "43.06"),
    ("X-EcoMLA, distilled", "AMD", "Llama-3.2-1B", "9.4 % of the cache", "mean of tasks, %", "52.85", "52.68"),
    ("GQA-8, trained", "Ainslie et al. 2023", "T5 XXL", "8 heads", "mean of tasks", "47.2", "47.1"),
)  # fmt: skip
"""Tool, source, model, budget, figure, before, after: as published, without a run here."""

Row = dict[str, Any]


def ours(arguments: argparse.Namespace, share: Fraction, blocks: torch.Tensor, heads: int) -> list[Row]:
    """Convert and score with uptrain: fewer heads where the share is a number of heads, and latents."""
    shapes: list[dict[str, Any]] = [{"target": "mla", "cache": float(share)}]
    if (share * heads).denominator == 1 and heads % int(share * heads) == 0:
        shapes.insert(0, {"target": "gqa", "groups": int(share * heads)})
    original, rows = load(str(resolve(arguments.model).path)), []
    for shape in shapes:
        for method in arguments.methods.split(","):
            if shape["target"] == "mla" and method == "mean":
                continue
            name = f"{shape['target']} {shape.get('groups', '')}".strip() + f", {method}"
            settings = {"calibrate": arguments.calibrate, "calibration_tokens": arguments.texts * TEXT_TOKENS}
            with tempfile.TemporaryDirectory(dir=arguments.work) as work:
                try:
                    request = Request(method=method, **shape, **(settings if method == "calibrated" else {}))
                    with timed() as timer:
                        convert(arguments.model, Path(work) / "out", request)
                except UptrainError as error:
                    rows.append({"tool": "uptrain", "method": name, "error": str(error)})
                    continue
                model = load(str(Path(work) / "out"))
            kept = cached_values(model, blocks[0]) / cached_values(original, blocks[0])
            found = score(model, original, blocks)
            rows.append({"tool": "uptrain", "method": name, "cache": kept, "seconds": timer.seconds, **found})
            print(markdown([rows[-1]]), file=sys.stderr, flush=True)
    return rows


def theirs(arguments: argparse.Namespace, share: Fraction, job: Row) -> list[Row]:
    """Have every other tool do the job in a process of its own."""
    rows = []
    for peer, method in PEERS:
        if arguments.kind == "gpt2" and ("rotary" in method or "xkv" in method):
            continue
        request = json.dumps({**job, "peer": peer, "method": method, "share": float(share)})
        command = [arguments.peer_python, str(Path(__file__).with_name("peer_models.py"))]
        done = subprocess.run(command, input=request, text=True, capture_output=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            rows.append({"tool": peer, "method": method, "error": last})
        else:
            rows.append({"tool": peer, "method": method, **json.loads(done.stdout.strip().splitlines()[-1])})
        print(markdown([rows[-1]]), file=sys.stderr, flush=True)
    return rows


def markdown(rows: list[Row]) -> str:
    """Write rows as a table's lines."""
    lines = []
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['tool']} | {row['method']} | does not run: {row['error']} | | | | |")
            continue
        cache = f"{row['cache']:.1%}" if row["cache"] else "–"
        lines.append(
            f"| {row['tool']} | {row['method']} | {cache} | {row['perplexity']:.2f} | {row['kl']:.4f} "
            f"| {row['top1_agreement']:.1%} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def published() -> str:
    """Write what tools published that can't be installed from a registry."""
    columns = ("tool", "figures of", "model", "budget", "figure", "before", "after")
    return table(dict.fromkeys(columns, "left"), PUBLISHED)


def main() -> None:
    """Measure, print the tables and write JSON."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    parser = options("--model", "--text", "--calibrate", "--work", "--out", out={"default": Path("peers.json")})
    parser.add_argument("--share", default="1/2,1/4", help="shares of the cache to keep, with commas")
    parser.add_argument("--blocks", type=int, default=8, help="of that text")
    parser.add_argument("--block", type=int, default=512, help="tokens per block")
    parser.add_argument("--texts", type=int, default=64, help=f"of --calibrate, {TEXT_TOKENS} tokens each")
    parser.add_argument("--methods", default="mean,svd,calibrated", help="ours, with commas")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has the other tools")
    arguments = parser.parse_args()
    register()
    folder = resolve(arguments.model).path
    config = AutoConfig.from_pretrained(folder)
    arguments.kind = config.model_type
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    blocks = token_blocks(folder, arguments.text, arguments.blocks, arguments.block)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.decode(row) for row in token_blocks(folder, arguments.calibrate, arguments.texts, TEXT_TOKENS)]
    original = load(str(folder))
    base = {"tool": "original", "method": "", "cache": 1.0, "seconds": 0.0, **score(original, original, blocks)}
    result: dict[str, Any] = {"settings": settings_of(arguments), "shares": {}}
    with tempfile.TemporaryDirectory() as work:
        torch.save(blocks, Path(work) / "blocks.pt")
        job = {"model": str(folder), "blocks": f"{work}/blocks.pt", "texts": texts, "text_tokens": TEXT_TOKENS}
        for share in map(Fraction, arguments.share.split(",")):
            rows = [base, *ours(arguments, share, blocks, heads), *theirs(arguments, share, job)]
            result["shares"][str(share)] = rows
            print(f"\n{arguments.model}, {share} of the cache:\n")
            figures = dict.fromkeys(("cache", "perplexity", "KL", "top-1", "s"), "right")
            print(table({"tool": "left", "method": "left", **figures}))
            print(markdown(rows), flush=True)
            write_json(arguments.out, result)
    print(f"\nAs published, not run here:\n\n{published()}")
