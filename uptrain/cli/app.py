"""The command line: gathers the commands, and turns errors into exit codes."""

from __future__ import annotations

from collections.abc import Sequence

import click

from uptrain import __version__
from uptrain.cli import (
    console,
    convert,
    demo,
    evaluate,
    families,
    inspect,
    push,
    recipes,
    report,
    sign,
    sweep,
    train,
    verify,
)
from uptrain.cli.options import examples
from uptrain.errors import Interrupted, UptrainError, refusal


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(
        "uptrain inspect demo                          what it is, and what it can become",
        "uptrain convert demo --to gqa --groups 4      writes ./demo-gqa4",
        "uptrain train recipes/demo-uptrain.yaml       uptrains it",
        "uptrain eval demo-gqa4 --baseline demo        measures what it lost and what it saves",
        "uptrain sweep demo --to gqa:4,mqa,mla:128     compares several targets and methods",
        "uptrain report demo-gqa4                      writes a page with charts",
        "uptrain push demo-gqa4 me/demo-gqa4           publishes it",
    ),
)
@click.version_option(__version__, prog_name="uptrain")
def cli() -> None:
    """Make a trained language model cheaper to serve without making it dumber.

    uptrain takes a checkpoint with many key/value heads (MHA, or GQA with many groups) and writes one with fewer (GQA,
    MQA) or with a small latent (MLA). It trains the result briefly, and measures what it lost and what it saves.

    MODEL is a checkpoint folder, a Hub id such as org/name, or 'demo', a small checkpoint inside this package.
    """


COMMANDS: dict[str, click.Command] = {
    "inspect": inspect.inspect,
    "families": families.families,
    "convert": convert.convert,
    "recipes": recipes.recipes,
    "train": train.train,
    "eval": evaluate.evaluate,
    "sweep": sweep.sweep,
    "report": report.report,
    "verify": verify.verify,
    "sign": sign.sign,
    "push": push.push,
    "demo": demo.demo,
}
"""Every command by its name. A new command is one file of this package and one line here."""

for _name, _command in COMMANDS.items():
    cli.add_command(_command, _name)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code. An error is printed on stderr, with what to do."""
    try:
        # click returns an exit code, or what the command returned: None.
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
        refused = refusal(error, f"uptrain {next(iter(arguments), '')}")
        if refused is None:
            raise
        console.fail(refused)
        return refused.exit_code
    except BrokenPipeError:
        return 0
    except OSError as error:
        console.fail(UptrainError(f"{error.filename or 'A file'}: {error.strerror or error}."))
        return 1
    return code if isinstance(code, int) else 0
