"""Entry point: imports the verb, runs it and turns errors into one line."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from teal.foundation.errors import MissingExtraError, UserError

# Verb → (module, one line for `teal --help`), in the order of the pipeline. A module is imported
# when its verb is called, so that help does not wait for torch.
VERBS = {
    "calibrate": ("teal.cli.calibrate", "Measure a model's activations on a text."),
    "import": ("teal.cli.import_statistics", "Import activation histograms published by TEAL."),
    "allocate": ("teal.cli.allocate", "Spread a sparsity budget over the projections: a plan."),
    "inspect": ("teal.cli.inspect", "Show the content of statistics or of a plan."),
    "quantize": ("teal.cli.quantize", "Write a model with weights of 8 or 4 bits."),
    "evaluate": ("teal.cli.evaluate", "Score a model, dense and sparse, on a text."),
    "generate": ("teal.cli.generate", "Continue a prompt, dense or sparse."),
    "bench": ("teal.cli.bench", "Time the kernels beside dense products and the memory limit."),
    "demo": ("teal.cli.demo", "Run the whole pipeline on a small model and write a report."),
}

_INTERRUPTED = 130
_UsageError: Any = typer.BadParameter.__base__


class LazyGroup(TyperGroup):
    """A command group that imports a verb only when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """List the verbs in pipeline order."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a placeholder that knows the verb's one-line help."""
        return TyperCommand(cmd_name, help=VERBS[cmd_name][1]) if cmd_name in VERBS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the verb that is called."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in VERBS:
            command = typer.main.get_command(import_module(VERBS[name][0]).app)
            command.name = name
        return name, command, rest


app = typer.Typer(cls=LazyGroup, add_completion=False, no_args_is_help=True)


def _show_version(asked: bool) -> None:
    if asked:
        from teal.foundation.version import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def teal(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Make a pretrained LLM decode faster by skipping the weights behind small activations."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: with 0 after success, 2 after a user's error.

    Args:
        arguments: Arguments after `teal`; `None` takes those of the process.
    """
    try:
        code = app(args=arguments, prog_name="teal", standalone_mode=False)
    except (UserError, MissingExtraError) as error:
        _fail(str(error))
    except _UsageError as error:
        _fail(f"{error.format_message()} Try: {_help_command(error)}")
    except OSError as error:
        _fail(f"{error.filename or 'The system'}: {error.strerror or error}.")
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    # Some versions of typer return this code for an interrupt.
    if code == _INTERRUPTED:
        _fail("Interrupted; nothing half-written is left.", _INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _help_command(error: Any) -> str:
    return f"{error.ctx.command_path} --help" if error.ctx is not None else "teal --help"


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
