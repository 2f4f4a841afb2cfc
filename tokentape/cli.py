"""The `tokentape` program: options that all commands share, exit codes, and one line for every error."""

from __future__ import annotations

import ast
import errno
import importlib
import sys
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import click

from schemas.errors import StorageFull, StoreUnavailable, TokentapeError, UsageError
from schemas.settings import Settings
from tokentape import __version__, config, logs

EPILOG = """\b
Exit codes: 0 done · 1 unexpected error · 2 usage or settings · 3 unknown session · 4 query refused
5 damaged or unreadable data · 6 verification failed (verify: 10 modified, 11 missing, 12 unsigned)
7 somebody else was first or holds it · 8 a part does not answer · 9 the log is another one than before"""


GROUPS = {
    "Run": {"up": "services", "status": "pipeline", "doctor": "doctor", "keys": "keys", "batch": "batch"},
    "Look": {
        "sessions": "query",
        "show": "query",
        "timeline": "query",
        "sql": "query",
        "tail": "query",
        "annotate": "query",
        "blob": "query",
        "snapshots": "snapshots",
    },
    "Stop and edit": {"breakpoints": "debug", "stopped": "debug"},
    "Replay": {
        "replay": "replay",
        "compare": "replay",
        "replay-batch": "replay_batch",
        "fork": "fork",
        "suite": "suite",
        "drive": "drive",
        "dataset": "dataset",
        "env": "engines",
        "calibrate": "engines",
    },
    "Look into an engine": {
        "engine-runs": "exact",
        "kv": "kv",
        "debug-engine": "debug_engine",
        "tour": "tour",
        "weights": "weights",
    },
    "Keep and forget": {
        "index": "pipeline",
        "merge": "pipeline",
        "tier": "pipeline",
        "iceberg": "pipeline",
        "rebuild": "pipeline",
        "jobs": "pipeline",
        "quarantine": "pipeline",
        "capacity": "capacity",
        "retention": "retention",
        "hold": "retention",
        "erase": "retention",
        "backup": "backup",
        "restore": "backup",
        "drill": "backup",
    },
    "Prove and hand over": {
        "verify": "custody",
        "prove": "ledger",
        "ledger": "ledger",
        "case": "casefile",
        "export": "exporting",
        "import": "exporting",
    },
}
"""Commands by what they are for, each with the module of `tokentape.commands` that holds it."""

COMMANDS = {name: module for group in GROUPS.values() for name, module in group.items()}
"""Modules are imported when a command is asked for: most need few parts."""


def summaries() -> dict[str, str]:
    """Each command's docstring, read from the source: importing all of them for a list of names takes seconds."""
    found: dict[tuple[str, str], str] = {}
    for module in dict.fromkeys(COMMANDS.values()):
        source = resources.files("tokentape.commands").joinpath(f"{module}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and (told := ast.get_docstring(node)):
                calls = [each for each in node.decorator_list if isinstance(each, ast.Call) and each.args]
                names = [arg.value for call in calls for arg in call.args[:1] if isinstance(arg, ast.Constant)]
                found |= {(module, str(name)): told for name in (*names, node.name.replace("_", "-"))}
    return {name: found[module, name] for name, module in COMMANDS.items()}


class Program(click.Group):
    """A group that imports a command when it is asked for, prints each error as one line and its hint, and exits with its code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order of their jobs."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One command."""
        if cmd_name not in COMMANDS:
            return None
        found: list[click.Command] = importlib.import_module(f"tokentape.commands.{COMMANDS[cmd_name]}").COMMANDS
        return next(command for command in found if command.name == cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands under what they are for."""
        longest, told = max(map(len, COMMANDS)), summaries()
        for heading, names in GROUPS.items():
            with formatter.section(heading):
                width = formatter.width - longest - 6
                formatter.write_dl(
                    [(name.ljust(longest), click.Command(name, help=told[name]).get_short_help_str(width)) for name in names]
                )

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the options that all commands share."""
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            raise SystemExit(_say(_of_click(error))) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except TokentapeError as error:
            _fail(ctx, error)
        except BrokenPipeError:
            sys.stderr.close()  # whoever read the output has gone; Python would complain while flushing
            ctx.exit(0)
        except KeyboardInterrupt:
            ctx.exit(130)
        except click.UsageError as error:
            _fail(ctx, _of_click(error))
        except OSError as error:
            _fail(ctx, _of_system(error, ctx))
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            settings = ctx.obj
            if isinstance(settings, Settings) and settings.logging.level == "debug":
                raise
            first = (str(error).splitlines() or [""])[0]
            hint = "--set logging.level=debug shows where; please report it"
            _fail(ctx, TokentapeError(f"unexpected {type(error).__name__}: {first}", operation=ctx.invoked_subcommand or "", hint=hint))


def _of_click(error: click.UsageError) -> UsageError:
    """An error of the command line in our shape. A group without a command is asked for help, and gives it."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        raise error
    return UsageError(error.format_message(), hint=f"{error.ctx.command_path if error.ctx else 'tokentape'} --help")


_NAMED_WRONG = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def _of_system(error: OSError, ctx: click.Context) -> TokentapeError:
    """An error of the operating system in our shape: a path that somebody named wrong, a full disk, or a store that fails."""
    place, operation, fault = str(error.filename or ""), ctx.invoked_subcommand or "", error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(fault, operation=operation, place=place, hint="free some space and try again")
    own = isinstance(ctx.obj, Settings) and Path(place).absolute().is_relative_to(ctx.obj.data.absolute())
    kind = UsageError if isinstance(error, _NAMED_WRONG) and place and not own else StoreUnavailable
    return kind(fault, operation=operation, place=place, hint="check the path and its permissions")


def _fail(ctx: click.Context, error: TokentapeError) -> NoReturn:
    ctx.exit(_say(error))


def _say(error: TokentapeError) -> int:
    """Say an error in its line, its hint below; the exit code."""
    click.echo(f"tokentape: {error}", err=True)
    if error.hint:
        click.echo(f"  hint: {error.hint}", err=True)
    return error.exit_code


@click.group(cls=Program, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="tokentape")
@click.option("--data", type=click.Path(path_type=Path), help="The data directory.  [default: ./.tokentape]")
@click.option("--config", "file", type=click.Path(path_type=Path), help="Settings file.  [default: ./tokentape.toml]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="One setting, e.g. log.kind=kafka.")
@click.pass_context
def main(ctx: click.Context, data: Path | None, file: Path | None, overrides: tuple[str, ...]) -> None:
    """The flight recorder of LLM inference: record, query, prove and replay.

    Settings come from tokentape.toml, TOKENTAPE_… variables and --set, in that order of rising weight.
    Nothing else needs to run: embedded, each command indexes what the log holds first.
    """
    ctx.obj = config.load(file=file, data=data, overrides=overrides)
    logs.configure(ctx.obj.logging.model_copy(update={"level": "warning"}), part=ctx.invoked_subcommand or "tokentape")


if __name__ == "__main__":
    main()
