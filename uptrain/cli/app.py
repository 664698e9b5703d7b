"""The command line: options and help. Bodies import what they need when they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from uptrain import __version__
from uptrain.cli import console, evaluate, push, report, sweep, train, verify
from uptrain.cli.method_help import grouping_help, method_help
from uptrain.cli.types import Share, Size, check_device, device_option
from uptrain.errors import Interrupted, UptrainError, refusal
from uptrain.methods.registry import methods_with

Command = TypeVar("Command", bound=Callable[..., Any])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="uptrain")
def cli() -> None:
    """Make a trained language model cheaper to serve without making it dumber.

    uptrain turns a checkpoint whose attention heads each keep their own keys and values (MHA, or GQA with many
    groups) into one that keeps fewer (GQA, MQA) or a small latent (MLA), trains it briefly, and measures what it
    lost and saved.

    MODEL is a checkpoint folder, a Hub id such as org/name, or 'demo', a small checkpoint inside this package.

    \b
    uptrain inspect demo                          what is it, what can it become
    uptrain convert demo --to gqa --groups 4      writes ./demo-gqa4
    uptrain train recipes/demo-uptrain.yaml       uptrains it
    uptrain eval demo-gqa4 --baseline demo        proves what it lost and saved
    uptrain sweep demo --to gqa:4,mqa,mla:128     tries several, and shows which are worth having
    uptrain report demo-gqa4                      shows that as a page with pictures
    uptrain push demo-gqa4 me/demo-gqa4           publishes it
    """


def _source_options(command: Command) -> Command:
    command = click.option("--revision", help="Branch, tag or commit, for a Hub id.")(command)
    return click.option(
        "--allow-pickle",
        is_flag=True,
        help="Also read .bin weights (restricted unpickling). Only if you trust them.",
    )(command)


@cli.command()
@click.argument("model")
@_source_options
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="OUT.png", help="Draw which heads resemble each other, and the "
    "spectra of all keys and values.",
)  # fmt: skip
@click.option(
    "--suggest", type=Share(), metavar="SHARE", help="Name what keeps at most this share of the cache, e.g. 25%, and "
    "the energy each keeps. Needs torch.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def inspect(
    model: str, revision: str | None, allow_pickle: bool, plot: Path | None, suggest: float | None, as_json: bool
) -> None:
    """Say what MODEL is, what its cache costs, and what it can become.

    Reads headers and config.json only: a 70 B checkpoint takes no longer than a small one. --plot and --suggest read
    the weights of a few layers too.

    \b
    uptrain inspect demo
    uptrain inspect demo --suggest 25%
    uptrain inspect ./llama --plot heads.png
    """
    from uptrain.cli import convert_report
    from uptrain.conversion.inspection import inspect as run

    found = run(model, revision=revision, allow_pickle=allow_pickle)
    layers = None
    if plot is not None:
        from uptrain.publishing.page.head_maps import plot_heads

        layers = plot_heads(model, plot, revision=revision, allow_pickle=allow_pickle)
    if suggest is None:
        convert_report.inspection(found, as_json)
    else:
        from uptrain.conversion.suggestion import suggest as look

        convert_report.suggestions(found, look(model, suggest, revision=revision, allow_pickle=allow_pickle), as_json)
    if layers is not None:
        console.note(f"Drew layers {', '.join(map(str, layers))} to {plot}.")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--markdown", is_flag=True, help="Print the table of docs/families.md.")
def families(as_json: bool, markdown: bool) -> None:
    """List the model families that can be converted, and the class that holds each result.

    Where several classes are named, the first that is exact for the checkpoint takes it. A class marked * ships its
    own modelling file inside the checkpoint.
    """
    from uptrain.cli import families_report
    from uptrain.conversion.family_table import families as known

    if markdown:
        console.result(families_report.markdown(known()))
        return
    families_report.table(known(), as_json)


_LATENT_OPTIONS = (
    click.option("--cache", type=Share(), help="Of --to mla: share of MODEL's cache to keep, e.g. 25%."),
    click.option("--kv-lora-rank", type=int, help="Of --to mla: values a token in the latent, instead of --cache."),
    click.option("--qk-rope-head-dim", type=int, help="Of --to mla: rotary values a token beside it."),
    click.option(
        "--rope",
        help="Of --to mla, how keys carry positions: grid (the highest frequencies in a shared rotary key; stock "
        "deepseek_v3, any engine; the default), longrope (a table of the model's own; transformers only), or "
        "re-rotate (all keys in the latent, rotated when read; own class, decoding re-expands the context).",
    ),
    click.option("--q-lora-rank", type=int, help="Of --to mla: low-rank queries. Default: whole ones."),
    click.option(
        "--engine",
        default="any",
        show_default=True,
        help="Of --to mla: any (transformers, vLLM) or llama.cpp, which wants queries in two factors.",
    ),
    click.option("--key-weight", type=float, help="Of --to mla: how much more keys count than values. Default: tried."),
)


def _latent_options(command: Command) -> Command:
    for option in reversed(_LATENT_OPTIONS):
        command = option(command)
    return command


_SEEDED = " or ".join(methods_with("seed"))


@cli.command()
@click.argument("model")
@click.argument("out", required=False)
@click.option("--to", "target", default="gqa", show_default=True, help="Target attention: gqa, mqa or mla.")
@click.option("--groups", type=int, help="Key/value heads to keep; must divide those there are.")
@_latent_options
@click.option(
    "--method",
    help=method_help(),
)
@click.option(
    "--grouping",
    default="contiguous",
    show_default=True,
    help=grouping_help(),
)
@click.option("--seed", type=int, help=f"For --method {_SEEDED} and --grouping similar. Default: 0.")
@click.option(
    "--calibrate",
    help="Text for --method calibrated: a file, a dataset, or builtin (the default).",
    metavar="TEXT",
)
@click.option(
    "--calibration-tokens", type=int, help="Of --method calibrated: how much of that text to use. Default: 65536."
)
@click.option(
    "--repair-steps", type=int, help="Of --method calibrated: gradient steps a layer afterwards; 0 for none. Default: "
    "40.",
)  # fmt: skip
@click.option(
    "--memory",
    type=Size(),
    help="Of --method calibrated; activations that this leaves no room for go to files beside OUT. Default: 4GiB.",
)
@device_option
@click.option("--dtype", help="Store floating weights as bfloat16, float16, float32 or float64. Default: as they are.")
@click.option(
    "--allow-nonfinite",
    is_flag=True,
    help="Keep NaN and infinite values of MODEL; in attention, with --method mean or first.",
)
@click.option("--max-shard-size", type=Size(), help="Split weights, e.g. 5GB. Default: as MODEL is split.")
@_source_options
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists (only once the new one is whole).")
@click.option(
    "--join",
    is_flag=True,
    help="Share the work with every process that runs this same command, here or on machines that see the same OUT.",
)
@click.option(
    "--diagnose",
    is_flag=True,
    help="Also measure each layer: the energy that each method keeps, and how similar the heads are that share.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be written, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def convert(model: str, out: str | None, **options: Any) -> None:
    """Convert MODEL to fewer key/value heads, or a latent, and write it to OUT.

    OUT is ./NAME-gqa4, ./NAME-mqa or ./NAME-mla128, after what was asked for, if it isn't named.

    Weights stream through: memory stays at a few layers whatever the model's size. A run that was cut off
    resumes when the same command is repeated. OUT appears only when it is whole.

    \b
    uptrain convert demo --to gqa --groups 4
    uptrain convert demo --to mqa --method svd
    uptrain convert ./llama --to mqa --calibrate text.txt
    uptrain convert demo --to mla --cache 25%
    uptrain convert ./llama --to mla --kv-lora-rank 512 --calibrate text.txt
    uptrain convert ./llama-2-7b ./llama-2-7b-mqa --to mqa --max-shard-size 5GB
    uptrain convert org/llama --to gqa --groups 8 --dry-run
    """
    from uptrain.cli import convert_report
    from uptrain.conversion.request import Request
    from uptrain.conversion.run.convert import check_memory, default_out, plan_conversion, run_plan, sidecars

    names = (
        "target", "groups", "grouping", "seed", "dtype", "max_shard_size", "calibrate", "calibration_tokens",
        "repair_steps", "cache", "kv_lora_rank", "qk_rope_head_dim", "rope", "q_lora_rank", "engine", "key_weight",
        "allow_nonfinite",
    )  # fmt: skip
    method = options["method"] or ("calibrated" if options["calibrate"] else "auto")
    request = Request(method=method, **{name: options[name] for name in names})
    check_memory(options["memory"], request)
    check_device(request.chosen_method.needs_text)
    source, checkpoint, plan = plan_conversion(
        model,
        request,
        revision=options["revision"],
        allow_pickle=options["allow_pickle"],
        dry=options["dry_run"],
    )
    folder = Path(out) if out else default_out(source, plan)
    if options["dry_run"]:
        beside = sidecars(source, checkpoint, dry=True)
        convert_report.dry_run(source, plan, beside, folder, options["as_json"])
        return
    console.note(f"Reading {source.describe()}")
    settings = {
        "overwrite": options["overwrite"],
        "join": options["join"],
        "diagnose": options["diagnose"],
        "memory": options["memory"],
        "on_note": console.note,
    }
    with console.bytes_progress("Converting", plan.total_bytes) as advance:
        done = run_plan(
            source, checkpoint, plan, folder, on_progress=advance, on_layer=console.layer_progress(), **settings
        )
    convert_report.conversion(done, options["as_json"])


for _module in (train, evaluate, sweep, verify, report, push):
    for _name, _command in _module.COMMANDS.items():
        cli.add_command(_command, _name)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code; errors become one sentence on stderr."""
    try:
        # What click returns is the exit code of a command that asked for one; ours return nothing else.
        code = cli.main(args=list(arguments), prog_name="uptrain", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        console.fail(Interrupted("Interrupted."))
        return Interrupted.exit_code
    except UptrainError as error:
        console.fail(error)
        return error.exit_code
    except ImportError as error:
        told = refusal(error, f"uptrain {next(iter(arguments), '')}")
        if told is None:
            raise
        console.fail(told)
        return told.exit_code
    except BrokenPipeError:
        return 0
    except OSError as error:
        console.fail(UptrainError(f"{error.filename or 'A file'}: {error.strerror or error}."))
        return 1
    return code if isinstance(code, int) else 0
