"""Following a rollout or a job until it ends: live on a terminal, a line per change elsewhere, JSON lines for programs.

Counts come from PostgreSQL; the workflow is asked only for what it alone knows (its timer, what it waits for), and a
worker that is away costs nothing but that. A database that goes away is waited for. What is followed, and how it looks,
is the business of whoever derives from `Following`.
"""

import asyncio
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import psycopg
from psycopg_pool import PoolTimeout
from rich.console import RenderableType
from rich.live import Live
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import TemporalError
from temporalio.service import RPCError, RPCStatusCode

from cli.command import Session
from cli.output import ExitStatus, Output, as_json, status_of_outcome, when
from cli.screen import event_text
from models.errors import NotFoundError, TidegateError
from models.rollout import Outcome
from models.views import EventView
from store.engine import Database

POLL_SECONDS = 0.5
ASK_SECONDS = 2.0
"""How often the workflow is asked, and how long its answer may take."""
LOOK_SECONDS = 5.0
"""How long PostgreSQL may take before the screen says that what it shows is old."""
EVENTS_READ = 100


class Seen(Protocol):
    """What is followed, at one moment."""

    @property
    def at(self) -> datetime:
        """That moment."""

    @property
    def events(self) -> Sequence[EventView]:
        """The last ones, oldest first."""

    @property
    def trouble(self) -> str:
        """Why what is shown is old; empty when it is not."""

    @property
    def outcome(self) -> Outcome | None:
        """How it has ended."""

    @property
    def needs_person(self) -> bool:
        """Whether it goes on only when somebody decides."""

    @property
    def screen(self) -> RenderableType:
        """All of it, for a terminal."""

    @property
    def line(self) -> str:
        """All of it in one line, without the time, so that two lines differ only when something has changed."""

    @property
    def as_object(self) -> dict[str, Any]:
        """All of it for a program."""


class Ended(Protocol):
    """A workflow's result."""

    @property
    def name(self) -> str:
        """Of the rollout or job."""

    @property
    def outcome(self) -> Outcome:
        """How it ended."""

    @property
    def reason(self) -> str:
        """Why."""

    def model_dump(self, *, mode: str = ...) -> dict[str, Any]:
        """For a program."""


SeenT = TypeVar("SeenT", bound=Seen)
EndedT = TypeVar("EndedT", bound=Ended)


class Following(ABC, Generic[SeenT, EndedT]):
    """One rollout or job being followed. `kind` is its word in sentences, in JSON and on the command line."""

    kind: ClassVar[str]
    result_type: type[EndedT]

    def __init__(self, session: Session, db: Database, name: str, client: Client | None) -> None:
        self.session = session
        self.db = db
        self.name = name
        self.client = client
        self._asked_at = 0.0
        self._last: SeenT | None = None
        self._asking: asyncio.Task[None] | None = None

    @property
    @abstractmethod
    def handle(self) -> WorkflowHandle[Any, EndedT] | None:
        """Its workflow, where Temporal answers."""

    @abstractmethod
    async def look(self) -> SeenT:
        """How it stands now. Raises NotFoundError while it has no plan."""

    @abstractmethod
    async def ask(self) -> None:
        """Learn what the workflow says of itself. Raises RPCError, TemporalError."""

    @abstractmethod
    def forget(self) -> None:
        """The workflow does not answer: what it said before counts no more."""

    @abstractmethod
    def failed(self, reason: str) -> EndedT:
        """The result of one whose workflow has failed."""

    @abstractmethod
    def figures(self, seen: SeenT) -> dict[str, Any]:
        """Its result for a program."""

    @abstractmethod
    def tell_waiting(self, seen: SeenT) -> str:
        """What it waits for, and what a person does about it."""

    @abstractmethod
    def old(self, seen: SeenT, trouble: str) -> SeenT:
        """The same, marked."""

    @abstractmethod
    def said(self, seen: SeenT) -> str:
        """Why it stands where it stands."""

    async def look_once(self) -> SeenT:
        """How it stands now, the workflow's answer included."""
        await self._ask()
        return await self.look()

    async def look_again(self) -> SeenT:
        """How it stands now; the last that was seen, marked, while PostgreSQL does not answer."""
        try:
            self._last = await asyncio.wait_for(self.look(), LOOK_SECONDS)
        except (psycopg.OperationalError, PoolTimeout, TimeoutError):
            if self._last is None:
                raise
            return self.old(self._last, "PostgreSQL does not answer; what is shown is old, trying again")
        return self._last

    async def until_planned(self, patience: float | None) -> SeenT | EndedT | None:
        """Wait for the plan: how it stands, or its result where it ended without one, or None when patience is over."""
        loop = asyncio.get_running_loop()
        deadline = None if patience is None else loop.time() + patience
        next_ask = loop.time()
        while True:
            with suppress(NotFoundError):
                return await self.look_once()
            if loop.time() >= next_ask:
                next_ask = loop.time() + 1
                ended = await self._ended()
                if ended is not None:
                    return ended
            if deadline is not None and loop.time() >= deadline:
                return None
            await asyncio.sleep(0.1)

    async def _ended(self) -> EndedT | None:
        """The workflow's result, where it has ended. Raises NotFoundError where there is nothing of this name at all."""
        handle = self.handle
        if handle is None:
            raise NotFoundError(f"no {self.kind} {self.name!r}; '{self.kind} list' shows those that exist")
        try:
            described = await handle.describe()
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                raise NotFoundError(
                    f"no {self.kind} {self.name!r}; '{self.kind} list' shows those that exist"
                ) from error
            raise
        if described.status in (WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.CONTINUED_AS_NEW):
            return None
        try:
            return await handle.result()
        except WorkflowFailureError as error:
            return self.failed(
                f"the workflow ended {described.status.name.lower() if described.status else ''}: {error.cause}"
            )

    def ask_in_the_background(self) -> None:
        """Ask the workflow, unless that was just done."""
        now = asyncio.get_running_loop().time()
        if now - self._asked_at >= ASK_SECONDS and (self._asking is None or self._asking.done()):
            self._asked_at = now
            self._asking = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        try:
            await self.ask()
        except (RPCError, TemporalError):
            self.forget()

    async def close(self) -> None:
        """End what runs in the background."""
        if self._asking is not None:
            self._asking.cancel()
            with suppress(asyncio.CancelledError):
                await self._asking


async def temporal_if_there(session: Session) -> Client | None:
    """Temporal, or a message and None: what runs can be watched without it."""
    try:
        return await session.temporal()
    except TidegateError as error:
        session.out.say(f"note: {error}; watching without the workflow's own words")
        return None


async def follow(watch: Following[SeenT, EndedT], timeout: timedelta | None, stay: bool | None) -> ExitStatus:
    """Show it until it ends, and return what its end means.

    Args:
        watch: what is followed.
        timeout: leave with WAITING after this long.
        stay: whether to stay while it waits for a person; None: on a terminal only.
    """
    out = watch.session.out
    live = not out.as_json and out.console.is_terminal
    stays = live if stay is None else stay
    try:
        async with asyncio.timeout(timeout.total_seconds() if timeout else None):
            first = await watch.until_planned(None)
            if isinstance(first, watch.result_type):
                return tell_unplanned(watch.kind, out, first)
            return await (_live(watch, stays) if live else _lines(watch, stays))
    except TimeoutError:
        out.say(f"{watch.kind} {watch.name} goes on; stopped watching after {timeout}")
        return ExitStatus.WAITING
    finally:
        await watch.close()


async def _live(watch: Following[SeenT, EndedT], stays: bool) -> ExitStatus:
    console = watch.session.out.console
    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
        seen, status = await _until_over(watch, stays, lambda seen: live.update(seen.screen, refresh=True))
    _tell_end(watch, seen, status)
    return status


async def _lines(watch: Following[SeenT, EndedT], stays: bool) -> ExitStatus:
    """A line for each event and each change of the counts."""
    json_lines = watch.session.out.as_json
    last_event, last_line, last_object = 0, "", ""

    def show(seen: SeenT) -> None:
        nonlocal last_event, last_line, last_object
        for event in seen.events:
            if event.event_no > last_event:
                _emit(json_lines, {"event": event}, f"{when(event.at)}  * {event_text(event)}")
                last_event = event.event_no
        line = seen.trouble or seen.line
        found = as_json(seen.as_object) if json_lines else ""
        if line != last_line or found != last_object:
            _emit(json_lines, {"at": seen.at, watch.kind: seen.as_object}, f"{when(seen.at)}  {line}")
        last_line, last_object = line, found

    seen, status = await _until_over(watch, stays, show)
    _tell_end(watch, seen, status)
    return status


async def _until_over(
    watch: Following[SeenT, EndedT], stays: bool, show: Callable[[SeenT], None]
) -> tuple[SeenT, ExitStatus]:
    """Show it again and again until there is nothing more to watch."""
    while True:
        seen = await watch.look_again()
        show(seen)
        if (status := _over(seen, stays)) is not None:
            return seen, status
        await asyncio.sleep(POLL_SECONDS)


def _over(seen: Seen, stays: bool) -> ExitStatus | None:
    """The exit status, once there is nothing more to watch."""
    if seen.outcome is not None:
        return status_of_outcome(seen.outcome)
    return ExitStatus.WAITING if seen.needs_person and not stays else None


def _tell_end(watch: Following[SeenT, EndedT], seen: SeenT, status: ExitStatus) -> None:
    out = watch.session.out
    if out.as_json:
        _emit(True, {"result": {**watch.figures(seen), "exit_status": int(status)}}, "")
    if seen.outcome is not None:
        out.say(f"{watch.kind} {watch.name} {seen.outcome}: {watch.said(seen)}")
    else:
        out.say(watch.tell_waiting(seen))


def tell_unplanned(kind: str, out: Output, result: Ended) -> ExitStatus:
    """Say how something ended that never had a plan."""
    status = status_of_outcome(result.outcome)
    if out.as_json:
        _emit(True, {"result": {**result.model_dump(mode="json"), "exit_status": int(status)}}, "")
    out.say(f"{kind} {result.name} {result.outcome}: {result.reason}")
    return status


def _emit(json_lines: bool, data: dict[str, Any], line: str) -> None:
    sys.stdout.write((as_json(data) if json_lines else line) + "\n")
    sys.stdout.flush()
