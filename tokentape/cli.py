"""The `tokentape` program: options that all commands share, exit codes, and one line for every error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from schemas.errors import TokentapeError
from tokentape import __version__, config
from tokentape.commands import custody, pipeline, query, replay, services

EPILOG = """\b
Exit codes: 0 done · 1 unexpected error · 2 usage or settings · 3 unknown session · 4 query refused
5 damaged or unreadable data · 6 verification failed (verify: 10 modified, 11 missing, 12 unsigned)
7 somebody else was first or holds it · 8 a part does not answer · 9 the log is another one than before"""


class Program(click.Group):
    """A group that prints each error as one line and its hint, and exits with its code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except TokentapeError as error:
            click.echo(f"tokentape: {error}", err=True)
            if error.hint:
                click.echo(f"  hint: {error.hint}", err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            sys.stderr.close()  # whoever read the output has gone; Python would complain while flushing
            ctx.exit(0)
        except KeyboardInterrupt:
            ctx.exit(130)


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


for module in (services, query, replay, pipeline, custody):
    for command in module.COMMANDS:
        main.add_command(command)


if __name__ == "__main__":
    main()
