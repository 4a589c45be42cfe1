"""What all commands share: `--state`, `--json` and `--debug`, connections, and errors as a sentence and an exit status.

```python
@command(app, "list")
async def list_devices(session: Session, site: ...) -> None:
    async with session.database() as db: ...
```
"""

import asyncio
import functools
import getpass
import inspect
import logging
import os
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec
from urllib.parse import quote

import psycopg
import typer
from psycopg_pool import PoolTimeout
from pydantic import ValidationError
from temporalio.client import Client
from temporalio.service import RPCError

from cli.output import EXIT_HELP, ExitStatus, Output
from domain.mistakes import faults_of, path_of
from models.errors import InvalidInputError, Mistake, SpecError, TidegateError, UnavailableError
from models.settings import Endpoints, Settings
from store.engine import Database
from workflows.client import connect

CONNECT_SECONDS = 5.0
"""A person waits; a server that is up answers within milliseconds."""

StateOption = Annotated[
    Path | None,
    typer.Option(
        "--state", help="Directory of the stack's state (TIDEGATE_STATE_DIR, or .tidegate).", show_default=False
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; messages stay on stderr.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

P = ParamSpec("P")
Work = Callable[Concatenate["Session", P], Awaitable[ExitStatus | None]]


@dataclass(frozen=True)
class Shared:
    """The shared options where they stand before the command."""

    state: Path | None = None
    json: bool = False
    debug: bool = False


@dataclass(frozen=True)
class Session:
    """What a command works with."""

    settings: Settings
    endpoints: Endpoints
    out: Output

    @asynccontextmanager
    async def database(self) -> AsyncIterator[Database]:
        """PostgreSQL, for the length of the block."""
        url = _needed(self.settings.database_url, "PostgreSQL", "TIDEGATE_DATABASE_URL", self.settings)
        await _knock(url)
        db = Database(url, max_size=4)
        await db.open(CONNECT_SECONDS)
        try:
            yield db
        finally:
            await db.close()

    async def temporal(self) -> Client:
        """Temporal."""
        address = _needed(self.settings.temporal_address, "Temporal", "TIDEGATE_TEMPORAL_ADDRESS", self.settings)
        try:
            return await asyncio.wait_for(connect(address, self.settings.temporal_namespace), CONNECT_SECONDS)
        except TimeoutError as error:
            raise UnavailableError(
                f"cannot connect to Temporal at {address} within {CONNECT_SECONDS:.0f} s; "
                "start the stack with 'starter.py up', or check TIDEGATE_TEMPORAL_ADDRESS"
            ) from error

    def ui_link(self, workflow_id: str) -> str | None:
        """The workflow's page in the Temporal UI, where there is one."""
        if not self.endpoints.ui_url:
            return None
        base = f"{self.endpoints.ui_url.rstrip('/')}/namespaces/{self.settings.temporal_namespace}/workflows"
        return f"{base}/{quote(workflow_id, safe='')}"

    def enrolment_url(self) -> str:
        """The enrolment server's address. Raises UnavailableError where none is known."""
        return _needed(self.settings.enrolment_url, "the enrolment server", "TIDEGATE_ENROLMENT_URL", self.settings)

    def say_process(self, workflow_id: str) -> None:
        """Where a person can watch a workflow; nothing where there is no UI."""
        if link := self.ui_link(workflow_id):
            self.out.say(f"its process: {link}")


def _needed(address: str | None, server: str, variable: str, settings: Settings) -> str:
    if address is None:
        raise UnavailableError(
            f"no address of {server}: {settings.state_dir / 'endpoints.json'} does not exist or has none; "
            f"start the stack with 'starter.py up', name its directory with --state, or set {variable}"
        )
    return address


async def _knock(url: str) -> None:
    """One connection, because a pool tries again and again where a refusal is an answer already."""
    try:
        async with await psycopg.AsyncConnection.connect(url, connect_timeout=int(CONNECT_SECONDS)):
            return
    except psycopg.ProgrammingError as error:
        raise InvalidInputError(
            f"not an address of PostgreSQL: expected postgresql://user@host:port/name: {error}"
        ) from error
    except psycopg.OperationalError as error:
        info = psycopg.conninfo.conninfo_to_dict(url)
        raise UnavailableError(
            f"cannot connect to PostgreSQL at {info.get('host')}:{info.get('port', 5432)}/{info.get('dbname')}: "
            f"{_first_line(error)}; start the stack with 'starter.py up', or check TIDEGATE_DATABASE_URL"
        ) from error


def whoami() -> str:
    """Who asks, for the record: TIDEGATE_ACTOR, or the user of this process."""
    try:
        return os.environ.get("TIDEGATE_ACTOR") or getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def command(app: typer.Typer, name: str) -> Callable[[Work[P]], Work[P]]:
    """Make an async function a command of `app`, with the options all commands have."""

    def register(work: Work[P]) -> Work[P]:
        @functools.wraps(work)
        def run(context: typer.Context, *, state: Path | None, json: bool, debug: bool, **arguments: Any) -> None:
            given: Shared = context.find_root().obj or Shared()
            out = Output(json or given.json)

            async def main() -> ExitStatus | None:
                return await work(session_of(state or given.state, out), **arguments)  # type: ignore[call-arg]

            raise typer.Exit(int(run_safely(main, out, debug or given.debug)))

        _take_signature(run, work)
        app.command(name, epilog=EXIT_HELP)(run)
        return work

    return register


def guarded(work: Callable[P, None]) -> Callable[P, None]:
    """The same for a command that is a plain function: its errors become a message and an exit status."""

    @functools.wraps(work)
    def run(*arguments: P.args, **options: P.kwargs) -> None:
        try:
            work(*arguments, **options)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(int(ExitStatus.INTERRUPTED)) from None
        except Exception as error:
            raise typer.Exit(int(Output().error(error, message_of(error)))) from error

    return run


def settings_of(state: Path | None) -> Settings:
    """Settings from the environment alone. Raises SpecError with every variable that is wrong."""
    try:
        return Settings(state_dir=state) if state is not None else Settings()
    except ValidationError as error:
        wrong = [Mistake(f"TIDEGATE_{path_of(fault.where).upper()}", fault.message) for fault in faults_of(error)]
        raise SpecError("settings", wrong) from error


def session_of(state: Path | None, out: Output) -> Session:
    """Settings and endpoints, from the environment and the state directory."""
    settings = settings_of(state)
    path = settings.state_dir / "endpoints.json"
    try:
        endpoints = Endpoints.model_validate_json(path.read_bytes()) if path.exists() else Endpoints()
        return Session(settings.with_endpoints(), endpoints, out)
    except (ValidationError, OSError) as error:
        raise InvalidInputError(
            f"cannot read {path}: {error}; 'starter.py up' writes it, another file there has to go"
        ) from error


def run_safely(work: Callable[[], Awaitable[ExitStatus | None]], out: Output, debug: bool) -> ExitStatus:
    """Run a command to its end; an error becomes a message and an exit status, with `debug` after its traceback."""
    logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)  # says on its own what UnavailableError says

    async def main() -> ExitStatus:
        return await work() or ExitStatus.SUCCEEDED

    try:
        return asyncio.run(main())
    except KeyboardInterrupt:
        out.say("interrupted; a rollout that was started goes on")
        return ExitStatus.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has no reader
        return ExitStatus.ERROR
    except Exception as error:
        if debug:
            traceback.print_exc()
        return out.error(error, message_of(error))


def message_of(error: Exception) -> str:
    """What to tell a person about an error, ours or a library's."""
    first = _first_line(error)
    match error:
        case TidegateError():
            return str(error)
        case psycopg.errors.UndefinedTable() | psycopg.errors.UndefinedColumn():
            return f"the database has not the schema that this version needs: {first}; 'starter.py migrate' brings it there"
        case psycopg.OperationalError() | PoolTimeout():
            return f"PostgreSQL does not answer: {first}; start the stack with 'starter.py up', or check TIDEGATE_DATABASE_URL"
        case RPCError():
            return f"Temporal does not answer: {first}; start the stack with 'starter.py up', or check TIDEGATE_TEMPORAL_ADDRESS"
        case _:
            return f"unexpected {type(error).__name__}: {first}; --debug shows where"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _take_signature(run: Callable[..., None], work: Callable[..., Any]) -> None:
    """What typer reads: the work's parameters without its session, and the shared options."""
    given = inspect.signature(work, eval_str=True)
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in list(given.parameters.values())[1:]]
    keyword = inspect.Parameter.KEYWORD_ONLY
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    shared = [
        inspect.Parameter("state", keyword, default=None, annotation=StateOption),
        inspect.Parameter("json", keyword, default=False, annotation=JsonOption),
        inspect.Parameter("debug", keyword, default=False, annotation=DebugOption),
    ]
    run.__signature__ = inspect.Signature([context, *own, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (context, *own, *shared)}
