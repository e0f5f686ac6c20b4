"""The command line: `sqlext run`, `sqlext -c`, `sqlext doctor`.

stdout is data, stderr is talk. A command parses its arguments, calls the library, prints; nothing heavy is imported
before a command needs it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime.errors import Cancelled, DeployError, SqlextError, UserError, did_you_mean
from sqlext import __version__

if TYPE_CHECKING:
    from sqlext.connection import Connection


class ExitCode(IntEnum):
    """How a command ended."""

    OK = 0
    FAILED = 1  # a statement failed: DuckDB's error, or a model that stopped answering
    USAGE = 2  # something to correct: the command line, a statement of ours, an option, a checkpoint
    DEPLOY = 3  # a model did not come up
    CANCELLED = 130  # Ctrl-C


class _Commands(click.Group):
    """The commands; a script in place of one is told where it belongs."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            near = did_you_mean(args[0], self.commands)
            hint = f"sqlext {near}" if near else f"sqlext run {args[0]}"
            raise UserError(f"There is no command {args[0]}.", code="usage", hint=f"Write {hint}.") from None


def _script_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of everything that runs SQL."""
    for option in (
        click.option(
            "--json", "as_json", is_flag=True, help="Print each result row as a JSON object on its own line."
        ),
        click.option("--dialect", help="duckdb (the default), or spark to translate from it."),
        click.option("--set", "variables", multiple=True, metavar="K=V", help="Give ${K} the value V."),
        click.option("--db", help="DuckDB database file; in memory when not given."),
    ):
        command = option(command)
    return command


@click.group(cls=_Commands, invoke_without_command=True)
@click.version_option(__version__, prog_name="sqlext")
@click.option("-c", "--command", help="Run this SQL.")
@_script_options
@click.pass_context
def cli(context: click.Context, /, command: str | None, **said: Any) -> None:
    """SQL that runs the whole life of a language model on DuckDB.

    Without a command, SQL is read from -c or from stdin.
    """
    if context.invoked_subcommand is not None:
        return
    if command is None and sys.stdin.isatty():
        click.echo(context.get_help())
        return
    scripts = [(None, command)] if command is not None else [("stdin", sys.stdin.read())]
    _run(scripts, **said)


@cli.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@_script_options
@click.pass_context
def run(context: click.Context, /, files: Sequence[str], **said: Any) -> None:
    """Run SQL scripts, one after the other in one session; - is stdin."""
    before = context.parent.params if context.parent else {}  # given before the word `run`
    said = {name: value or before.get(name) for name, value in said.items()} | {
        "variables": (*before.get("variables", ()), *said["variables"])
    }
    _run([(name, _read(name)) for name in files], **said)


@cli.command()
@click.argument("functions", nargs=-1, metavar="FUNCTION…")
@click.option("--script", help="Run this script first, which deploys the functions.")
@click.option("--url", help="Address of an OpenAI-compatible service, instead of functions.")
@click.option("--model", help="The service's name of the model.")
@click.option("--concurrency", default="10", help="Requests in flight; several numbers, several runs: 1,4,16.")
@click.option("--results-dir", help="Folder for the JSON files and the HTML report.")
@click.option("-o", "--option", "more", multiple=True, metavar="K=V", help="Other option of the action benchmark.")
@_script_options
def bench(functions: Sequence[str], script: str | None, more: Sequence[str], **said: Any) -> None:
    """Load test of model functions, or of a service; every option is that of the action benchmark."""
    named = {
        "url": "url",
        "model": "saas.model",
        "concurrency": "num_concurrent_requests",
        "results_dir": "results_dir",
    }
    given = {key: said.pop(name) for name, key in named.items()} | dict(map(_variable, more))
    options = {"action": "benchmark", "udfName": ",".join(functions), **given}
    where = " AND ".join(f"`{key}`='''{value}'''" for key, value in options.items() if value)
    before = [(script, _read(script))] if script else []
    _run([*before, (None, f"RUN command AS LLM.`` WHERE {where}")], **said)


@cli.command()
@click.argument("function")
@click.option("--script", help="Run this script first, which deploys the function.")
@click.option("--system", default="", help="System message.")
@click.option(
    "--log", default="", metavar="FILE", help="Keep the exchanges here, instead of in the user's data folder."
)
@click.option("-o", "--option", "more", multiple=True, metavar="K=V", help="Named option, such as temperature=0.7.")
@_script_options
def chat(
    function: str, script: str | None, system: str, log: str, more: Sequence[str], as_json: bool, **said: Any
) -> None:
    """Talk to a model function; prompts are typed, or come through a pipe, one a line."""
    from sqlext import connect
    from sqlext.chat import ChatLog, Conversation, talk
    from sqlext.progress import Progress

    options = {name: _plain(value) for name, value in map(_variable, more)}
    if not sys.stdin.isatty():
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    with connect(said["db"] or ":memory:") as connection:
        with Progress(connection) as progress:
            _prepare(connection, said["variables"], said["dialect"])
            for _ in connection.run(_read(script), file=script) if script else ():
                progress.pause()
        if not talk(Conversation(connection, function, system, options), ChatLog(log, function), as_json=as_json):
            sys.exit(ExitCode.FAILED)


@cli.command()
@click.argument("db", required=False)
@click.option("--script", help="Run this script first.")
def shell(db: str | None, script: str | None) -> None:
    """A prompt for SQL and the statements of the language, on a database file or in memory."""
    from sqlext import connect, jobs
    from sqlext.progress import Progress
    from sqlext.shell import Shell, history_file

    with connect(db or ":memory:") as connection, Progress(connection) as progress:
        prompt = Shell(connection, progress, history_file())
        if script:
            prompt.take(f".read {script}")
        prompt.run()
        jobs.finish(connection)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print each finding as a JSON object on its own line.")
def doctor(as_json: bool) -> None:
    """Tell what is installed, which devices there are, and what a missing extra would give."""
    from runtime.doctor import examine
    from sqlext import connect, render

    with connect() as connection:
        render.show(connection.raw, render.table(examine()), "json" if as_json else "box")


def main() -> None:
    """Entry point of the command `sqlext`."""
    with _exit_codes():
        cli.main(standalone_mode=False)


def _run(
    scripts: Sequence[tuple[str | None, str]],
    db: str | None,
    variables: Sequence[str],
    dialect: str | None,
    as_json: bool,
) -> None:
    from sqlext import connect, jobs, render
    from sqlext.progress import Progress

    with connect(db or ":memory:") as connection, Progress(connection) as progress:
        _prepare(connection, variables, dialect)
        try:
            for name, text in scripts:
                for _ in connection.run(text, file=name):
                    if connection.has_rows:
                        table = connection.fetch_arrow_table()
                        progress.pause()
                        render.show(connection.raw, table, "json" if as_json else "box")
            jobs.finish(connection)
        except (KeyboardInterrupt, Cancelled):
            progress.pause()
            print("cancelled", file=sys.stderr)  # at once: ending the workers takes a moment
            raise


def _prepare(connection: Connection, variables: Sequence[str], dialect: str | None) -> None:
    from sqlext import actions

    connection.session.variables.update(dict(_variable(text) for text in variables))
    actions.set_dialect(connection, dialect or "duckdb")


def _plain(text: str) -> Any:
    """A value as it looks: a number, true, false, a list; else a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f'--set {text} has no "=".', code="usage", hint="Write --set name=value.")
    return name, value


def _read(name: str) -> str:
    if name == "-":
        return sys.stdin.read()
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"The script {name} cannot be read: {error.strerror}.", code="script_missing") from None
    except UnicodeDecodeError:
        raise UserError(f"The script {name} is not UTF-8 text.", code="script_encoding") from None


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except click.exceptions.Abort:
        sys.exit(ExitCode.CANCELLED)
    except click.ClickException as error:
        error.show()
        sys.exit(ExitCode.USAGE)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, Cancelled):
        sys.exit(ExitCode.CANCELLED)
    except DeployError as error:
        _leave(f"error: {error}", ExitCode.DEPLOY)
    except UserError as error:
        _leave(f"error: {error}", ExitCode.USAGE)
    except SqlextError as error:
        _leave(f"error: {error}", ExitCode.FAILED)
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone; nothing more to say to it
        sys.exit(ExitCode.OK)
    except Exception as error:
        import duckdb

        if not isinstance(error, duckdb.Error):
            raise
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        _leave(f"error: {error}{notes}", ExitCode.FAILED)


def _leave(text: str, code: ExitCode) -> None:
    print(text, file=sys.stderr)
    sys.exit(code)
