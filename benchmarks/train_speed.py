"""Tokens per second of `uptrain train` against transformers.Trainer: same model, batch, dtype, data and optimizer.

    python -m benchmarks train_speed --model demo
    python -m benchmarks train_speed --model /dev/shm/smollm2 --batch 2 --block 1024 --steps 6

Each trainer runs in a process of its own, in turns, with plain language-model loss and no teacher. The first steps of a
run warm up and are not counted; peak memory is the process's resident set. On a CPU that others use too, look at the
processor time, not at the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import child, options, peak_memory

TRAINERS = ("uptrain", "Trainer")
WARM_UP = 2


Moment = tuple[float, float]
"""Seconds on the clock, and of processor time."""


def now() -> Moment:
    return time.perf_counter(), time.process_time()


def run_uptrain(args: argparse.Namespace, folder: Path) -> list[Moment]:
    """Return the moment at which each step ended."""
    from uptrain.checkpoint.events import Events
    from uptrain.training import recipes, train

    recipe = recipes.parse_recipe({
        "model": args.model, "output": str(folder / "out"), "data": [args.data], "block_size": args.block,
        "batch_size": args.batch, "steps": args.steps, "precision": args.precision, "isolate_documents": False,
        "save_every": 10**6, "log_every": 10**6,
    })  # fmt: skip
    ends: list[Moment] = []
    train(recipe, events=Events(step=lambda step: ends.append(now())))
    return ends


def run_trainer(args: argparse.Namespace, folder: Path) -> list[Moment]:
    """Return the moment at which each step ended."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from uptrain.checkpoint.source import resolve
    from uptrain.data.sources import parse_source
    from uptrain.data.text_encoder import TextEncoder
    from uptrain.data.token_file import TokenFile
    from uptrain.models import loading
    from uptrain.models.opened import open_model

    loading.quiet()
    source = resolve(args.model)
    TokenFile.build(folder / "tokens", [parse_source(args.data)], TextEncoder(loading.load_tokenizer(source.path)))
    blocks = torch.from_numpy(TokenFile(folder / "tokens", args.block, 0).take(args.batch * args.steps))
    ends: list[Moment] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            ends.append(now())

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=args.batch, max_steps=args.steps,
        learning_rate=1e-4, lr_scheduler_type="cosine", weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
        bf16=args.precision == "bf16", optim="adamw_torch_fused", report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"input_ids": block, "labels": block} for block in blocks]
    Trainer(
        model=loading.load_model(open_model(source)).float(), args=arguments, train_dataset=rows, callbacks=[Clock()]
    ).train()
    return ends


def worker(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        ends = (run_uptrain if args.trainer == "uptrain" else run_trainer)(args, Path(folder))
    wall, processor = (
        statistics.median(
            later[kind] - earlier[kind] for earlier, later in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)
        )
        for kind in (0, 1)
    )
    print(json.dumps({
        "tokens_per_second": round(args.batch * args.block / wall, 1), "processor_s_per_step": round(processor, 3),
        "peak_rss_mb": round(peak_memory() / 1e6),
    }))  # fmt: skip


def main() -> None:
    parser = options("--model", "--work", work={"default": "/dev/shm" if Path("/dev/shm").is_dir() else None})
    parser.add_argument("--data", default="python-stdlib")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="fp32")
    parser.add_argument("--trainer", choices=TRAINERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trainer:
        worker(args)
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in TRAINERS}
    for turn in range(args.turns):
        for name in TRAINERS if turn % 2 == 0 else reversed(TRAINERS):
            found[name].append(child("train_speed", *sys.argv[1:], "--trainer", name))
            print(turn, name, found[name][-1], file=sys.stderr, flush=True)
    speeds = {name: [each["tokens_per_second"] for each in rows] for name, rows in found.items()}
    work = {name: [each["processor_s_per_step"] for each in rows] for name, rows in found.items()}
    ratios = [mine / theirs for mine, theirs in zip(*speeds.values(), strict=True)]
    saved = [theirs / mine for mine, theirs in zip(*work.values(), strict=True)]
    print(json.dumps({
        "model": args.model, "batch": args.batch, "block": args.block, "precision": args.precision,
        "tokens_per_second": speeds, "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "processor_s_per_step": work, "processor_ratio": round(statistics.median(saved), 3),
        "peak_rss_mb": {name: max(each["peak_rss_mb"] for each in rows) for name, rows in found.items()},
    }, indent=2))  # fmt: skip
