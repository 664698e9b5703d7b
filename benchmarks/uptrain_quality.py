"""What uptraining recovers: held-out perplexity against tokens seen, for several starts and objectives in one run.

    python -m benchmarks uptrain_quality --work WORK                     # the demo: GQA-2 and MQA
    python -m benchmarks uptrain_quality --work WORK --model SMOLLM2 --targets mqa --starts mean,calibrated \
        --objectives lm,distill --data wikitext2_valid.txt --text wikitext2_raw_test.txt --tokens 1000000

Every trial sees the same tokens in the same order with the same optimizer. `--text` is only scored: no setting is
chosen by it here. Line ends are "\n", whatever the file has.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import options, timed, write_json
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.source import resolve
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.data.documents import pieces
from uptrain.data.sources import Files, parse_source
from uptrain.data.token_text import read_tokens
from uptrain.models import loading
from uptrain.models.opened import open_model
from uptrain.training import recipes
from uptrain.training.losses import lm_loss
from uptrain.training.metrics import TrainingStep
from uptrain.training.run import train


@dataclass(frozen=True)
class Trial:
    """One run: the loss on held-out text, in nats per token, after each number of tokens seen."""

    target: str
    start: str
    objective: str
    held_out: list[tuple[int, float]]
    seconds: float


def with_plain_ends(source: Any, folder: Path, name: str) -> Any:
    """Return a source with "\n" line ends: a file may have come by way of "\r\n"."""
    if not isinstance(source, Files):
        return source
    text = "".join(piece.text for piece in pieces([source])).replace("\r\n", "\n")
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return Files(files=str(folder / name))


def held_out_loss(folder: str, text: Any, tokens: int, block: int) -> float:
    source = resolve(folder)
    model = loading.load_model(open_model(source), torch.float32).eval()
    ids = torch.from_numpy(read_tokens([text], loading.load_tokenizer(source.path), tokens).ids)
    blocks = ids[: len(ids) // block * block].view(-1, block)
    with torch.no_grad():
        return float(sum(lm_loss(model, rows[None]) for rows in blocks) / len(blocks))


def request_for(args: argparse.Namespace, target: str, start: str) -> Request:
    kind, _, groups = target.partition("-")
    names = ("calibrate", "calibration_tokens", "repair_steps")
    settings = {name: getattr(args, name) for name in names} if start == "calibrated" else {}
    return Request(kind, int(groups) if groups else None, start, **settings)


def run_trial(args: argparse.Namespace, target: str, start: str, objective: str, data: Any, text: Any) -> Trial:
    folder = Path(args.work)
    source = folder / f"{target}-{start}"
    if not source.exists():
        convert(args.model, source, request_for(args, target, start))
    seen = [(0, held_out_loss(str(source), text, args.held_out_tokens, args.held_out_block))]
    print(f"{target} {start} converted: perplexity {math.exp(seen[0][1]):.3f}", file=sys.stderr, flush=True)
    distill = {} if objective == "lm" else {"distill": {"weight": args.weight}}
    recipe = recipes.parse_recipe({
        "model": str(source), "output": str(folder / f"{target}-{start}-{objective}"), "overwrite": True,
        "data": [data.model_dump()], "held_out": [text.model_dump()], "held_out_tokens": args.held_out_tokens,
        "held_out_block_size": args.held_out_block, "block_size": args.block, "batch_size": args.batch,
        "tokens": args.tokens, "eval_every_tokens": args.every,
        "learning_rate": args.learning_rate, "schedule": "1-sqrt", "min_lr_ratio": 0.05, "warmup": 0.05,
        "train": args.train, "seed": 1, "save_every": 10**6, **distill,
    })  # fmt: skip

    def on_step(step: TrainingStep) -> None:
        if step.held_out_loss is not None:
            seen.append((step.tokens, step.held_out_loss))
            print(f"{target} {start} {objective} {step.tokens} tokens: perplexity "
                  f"{math.exp(step.held_out_loss):.3f}, {step.tokens_per_second:.0f} tokens/s",
                  file=sys.stderr, flush=True)  # fmt: skip

    with timed() as timer:
        done = train(recipe, restart=True, events=Events(step=on_step))
    assert done is not None
    assert done.held_out_loss is not None
    seen.append((done.tokens, done.held_out_loss))
    return Trial(target, start, objective, seen, round(timer.seconds, 1))


def plot(trials: list[Trial], base: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for trial in trials:
        axes.plot(*zip(*((tokens, math.exp(loss)) for tokens, loss in trial.held_out), strict=True), marker="o",
                  label=f"{trial.target}, {trial.start}, {trial.objective}")  # fmt: skip
    axes.axhline(math.exp(base), color="black", linestyle=":", label="original")
    axes.set(xlabel="tokens seen", ylabel="perplexity on held-out text", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = options(
        "--model", "--calibrate", "--calibration-tokens", "--repair-steps", "--text", "--work", "--out",
        calibrate={"default": None, "help": "text of the calibrated start (default: --data)"},
        calibration_tokens={"default": 32_768}, repair_steps={"default": 20},
        work={"required": True, "help": "an empty folder; conversions in it are used again"},
    )  # fmt: skip
    parser.add_argument("--targets", default="gqa-2,mqa")
    parser.add_argument("--starts", default="calibrated", help="mean, svd, calibrated")
    parser.add_argument("--objectives", default="distill", help="lm, distill")
    parser.add_argument("--data", default="python-stdlib", help="trained on")
    parser.add_argument("--held-out-tokens", type=int, default=32_768)
    parser.add_argument("--tokens", type=int, default=300_000, help="the demo's default: 5 %% of its pre-training")
    parser.add_argument("--every", type=int, default=60_000, help="tokens from one score to the next")
    parser.add_argument("--held-out-block", type=int, default=1024)
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--train", choices=["all", "attention"], default="all")
    args = parser.parse_args()
    args.calibrate = args.calibrate or args.data
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    data = with_plain_ends(parse_source(args.data), work, "data.txt")
    text = with_plain_ends(parse_source(args.text), work, "text.txt")
    base = held_out_loss(args.model, text, args.held_out_tokens, args.held_out_block)
    trials = [
        run_trial(args, target, start, objective, data, text)
        for target in args.targets.split(",")
        for start in args.starts.split(",")
        for objective in args.objectives.split(",")
    ]
    print(f"original: {base:.4f} nats per token, perplexity {math.exp(base):.3f}")
    for trial in trials:
        tokens, loss = trial.held_out[-1]
        start = math.exp(trial.held_out[0][1])
        print(f"{trial.target:6} {trial.start:10} {trial.objective:8} start {start:9.3f}  after "
              f"{tokens:>9,} tokens {math.exp(loss):8.3f}  {math.exp(loss - base):.3f} x  "
              f"{(loss / base - 1):+.2%} bits per byte  {trial.seconds:.0f} s")  # fmt: skip
    if args.out:
        values = {**vars(args), "out": str(args.out)}
        found = {"arguments": values, "original": base, "arms": [asdict(trial) for trial in trials]}
        write_json(args.out, found)
        plot(trials, base, args.out.with_suffix(".png"))
