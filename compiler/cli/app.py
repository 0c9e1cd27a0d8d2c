"""``bitwright``: the verbs, and what becomes of an error."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from bitwright import __version__
from bitwright.compiler.cli import (
    explaining,
    exporting,
    generating,
    gguf,
    looking,
    making,
    measuring,
    recipes,
    sweeping,
    targets,
    training,
    tuning,
)
from bitwright.compiler.cli.output import Output
from bitwright.compiler.cli.verb import verb
from bitwright.compiler.errors import BitwrightError, UsageError

INTERRUPTED = 130
USAGE = 2
BUG = 1
# Panels of the help.
MAKE, LOOK, CHOOSE = "Make a model", "Look, prove, measure, run", "Targets, formats, kernels"
# Its parser's errors have no public name in typer.
ParserError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

EPILOG = (
    "Exit codes: 0 done, 1 a bug in bitwright, 2 usage, profile or options, 3 model or data, "
    "4 a budget or the device's memory is too small, 5 accuracy gate, 6 performance or coverage gate, 7 tool chain, "
    "8 verification, 130 interrupted."
)

app = typer.Typer(
    name="bitwright",
    help="A hardware-aware quantizing compiler for ONNX models.",
    epilog=EPILOG,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
targets_app = typer.Typer(help="Target profiles: list, show, check, make, measure.")

verb(app, "quantize", MAKE)(making.quantize_verb)
verb(app, "compile", MAKE)(making.compile_verb)
verb(app, "train", MAKE)(training.train_verb)
verb(app, "export", MAKE)(exporting.export_verb)
verb(app, "gguf", MAKE)(gguf.gguf_verb)
verb(app, "inspect", LOOK)(looking.inspect_verb)
verb(app, "verify", LOOK)(looking.verify_verb)
verb(app, "report", LOOK)(looking.report_verb)
verb(app, "explain", LOOK)(explaining.explain_verb)
verb(app, "bench", LOOK)(measuring.bench_verb)
verb(app, "evaluate", LOOK)(generating.evaluate_verb)
verb(app, "generate", LOOK)(generating.generate_verb)
verb(app, "recipes", CHOOSE)(recipes.recipes_verb)
verb(app, "sweep", CHOOSE)(sweeping.sweep_verb)
verb(app, "tune", CHOOSE)(tuning.tune_verb)
verb(targets_app, "list")(targets.list_verb)
verb(targets_app, "show")(targets.show_verb)
verb(targets_app, "check")(targets.check_verb)
verb(targets_app, "new")(targets.new_verb)
verb(targets_app, "probe")(targets.probe_verb)
verb(targets_app, "schema")(targets.schema_verb)
app.add_typer(targets_app, name="targets", rich_help_panel=CHOOSE)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bitwright {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
]


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: Version = False) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@targets_app.callback(invoke_without_command=True)
def _targets(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        what = "a verb is missing"
        raise UsageError(what, where=context.command_path, fix=f"see {context.command_path} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name; None takes it from the process.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Until the options are read, an error's form goes by what was typed.
    out = Output(json="--json" in given, debug="--debug" in given)
    try:
        code = app(given, prog_name="bitwright", standalone_mode=False, obj=out)
    except BitwrightError as error:
        return out.error(error)
    except ParserError as error:
        return _usage(out, error)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(out)
    except BrokenPipeError:
        # The reader of stdout has gone; what it wanted, it has.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BUG
    except OSError as error:
        # Only a name that was typed can be so long, and every path of a command line is one.
        return _too_long(out) if error.errno == errno.ENAMETOOLONG else _bug(out, error)
    except Exception as error:
        return _bug(out, error)
    if code == INTERRUPTED:  # some versions of typer turn the interrupt into an exit code
        return _interrupted(out)
    return code if isinstance(code, int) else 0


def _interrupted(out: Output) -> int:
    return out.failure("Interrupted", "interrupted; nothing was left behind", "", "", INTERRUPTED)


def _too_long(out: Output) -> int:
    return out.failure("UsageError", "a file's name is too long", "", "name files by shorter paths", USAGE)


def _usage(out: Output, error: Exception) -> int:
    """Print what the parser found wrong."""
    context = getattr(error, "ctx", None)
    command = "bitwright" if context is None else context.command_path
    message = str(getattr(error, "format_message", error.__str__)())
    return out.failure("UsageError", message.strip(), command, f"see {command} --help", USAGE)


def _bug(out: Output, error: Exception) -> int:
    """Print one line about an exception nobody foresaw; the traceback is shown or kept."""
    what = f"this is a bug in bitwright: {type(error).__name__}: {' '.join(str(error).split())}"
    text = traceback.format_exc()
    if out.debug:
        print(text, file=sys.stderr, end="")
        return out.failure(type(error).__name__, what, "", "please report it with the traceback above", BUG)
    try:
        handle, path = tempfile.mkstemp(prefix="bitwright-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        fix = f"please report it with {path}"
    except OSError:
        fix = "run it again with --debug and report the traceback"
    return out.failure(type(error).__name__, what, "", fix, BUG)
