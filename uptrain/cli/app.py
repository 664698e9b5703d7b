"""The command line: gathers the commands, and gives every error its exit code."""

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
from uptrain.errors import Interrupted, UptrainError, refusal


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
"""Every command, by the name it is typed under: a new one is a file of this package and a line here."""

for _name, _command in COMMANDS.items():
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
