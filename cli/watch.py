"""Following a rollout until it ends: live on a terminal, a line per change elsewhere, JSON lines for programs.

Counts come from PostgreSQL; the workflow is asked only for what it alone knows (its timer, what it waits for), and a
worker that is away costs nothing but that. A database that goes away is waited for.
"""

import asyncio
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import psycopg
from psycopg_pool import PoolTimeout
from rich.live import Live
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import TemporalError
from temporalio.service import RPCError, RPCStatusCode

from cli.command import Session
from cli.output import ExitStatus, Output, as_json, status_of_outcome, when
from cli.screen import MEANING, Snapshot, event_text, line_of, object_of, screen
from models.errors import NotFoundError, TidegateError
from models.ids import rollout_workflow_id
from models.rollout import Outcome, RolloutResult, RolloutStatus
from models.views import EventView
from store.engine import Database
from store.rollouts import RolloutStore
from workflows.rollout import RolloutWorkflow

POLL_SECONDS = 0.5
ASK_SECONDS = 2.0
"""How often the workflow is asked, and how long its answer may take."""
LOOK_SECONDS = 5.0
"""How long PostgreSQL may take before the screen says that what it shows is old."""
EVENTS_READ = 100

Handle = WorkflowHandle[RolloutWorkflow, RolloutResult]


@dataclass
class Watch:
    """One rollout being followed."""

    session: Session
    db: Database
    name: str
    client: Client | None
    _status: RolloutStatus | None = field(default=None, init=False)
    _asked_at: float = field(default=0.0, init=False)
    _last: Snapshot | None = field(default=None, init=False)
    _asking: "asyncio.Task[None] | None" = field(default=None, init=False)

    @property
    def handle(self) -> Handle | None:
        """The rollout's workflow, where Temporal answers."""
        if self.client is None:
            return None
        return self.client.get_workflow_handle_for(RolloutWorkflow.run, rollout_workflow_id(self.name))

    async def look(self) -> Snapshot:
        """The rollout now. Raises NotFoundError while it has no plan."""
        view = await RolloutStore(self.db).show(self.name)
        events = await RolloutStore(self.db).events(view.job_no, EVENTS_READ)
        if view.outcome is None:
            self._ask_in_the_background()
        return Snapshot(
            at=datetime.now(UTC),
            view=view,
            events=tuple(events),
            status=self._status,
            ui_link=self.session.ui_link(rollout_workflow_id(self.name)),
        )

    async def look_once(self) -> Snapshot:
        """The rollout now, the workflow's answer included."""
        await self._ask()
        return await self.look()

    async def look_again(self) -> Snapshot:
        """The rollout now; the last one seen, marked, while PostgreSQL does not answer."""
        try:
            self._last = await asyncio.wait_for(self.look(), LOOK_SECONDS)
        except (psycopg.OperationalError, PoolTimeout, TimeoutError):
            if self._last is None:
                raise
            return replace(self._last, trouble="PostgreSQL does not answer; what is shown is old, trying again")
        return self._last

    async def until_planned(self, patience: float | None) -> Snapshot | RolloutResult | None:
        """Wait for the plan: the rollout, or its result where it ended without one, or None when patience is over."""
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

    async def _ended(self) -> RolloutResult | None:
        """The workflow's result, where it has ended. Raises NotFoundError where there is no such rollout at all."""
        handle = self.handle
        if handle is None:
            raise NotFoundError(f"no rollout {self.name!r}; 'rollout list' shows those that exist")
        try:
            described = await handle.describe()
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                raise NotFoundError(f"no rollout {self.name!r}; 'rollout list' shows those that exist") from error
            raise
        if described.status in (WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.CONTINUED_AS_NEW):
            return None
        try:
            return await handle.result()
        except WorkflowFailureError as error:
            reason = f"the workflow ended {described.status.name.lower() if described.status else ''}: {error.cause}"
            return RolloutResult(name=self.name, outcome=Outcome.FAILED, reason=reason)

    def _ask_in_the_background(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._asked_at >= ASK_SECONDS and (self._asking is None or self._asking.done()):
            self._asked_at = now
            self._asking = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        """What the workflow says of itself; nothing, where no worker answers."""
        if (handle := self.handle) is None:
            return
        try:
            self._status = await handle.query(RolloutWorkflow.status, rpc_timeout=timedelta(seconds=ASK_SECONDS))
        except (RPCError, TemporalError):
            self._status = None

    async def close(self) -> None:
        """End what runs in the background."""
        if self._asking is not None:
            self._asking.cancel()
            with suppress(asyncio.CancelledError):
                await self._asking


async def temporal_if_there(session: Session) -> Client | None:
    """Temporal, or a message and None: a rollout can be watched without it."""
    try:
        return await session.temporal()
    except TidegateError as error:
        session.out.say(f"note: {error}; watching without the workflow's own words")
        return None


async def follow(watch: Watch, timeout: timedelta | None, stay: bool | None) -> ExitStatus:
    """Show a rollout until it ends, and return what its end means.

    Args:
        timeout: leave with WAITING after this long.
        stay: whether to stay while it waits for a person; None: on a terminal only.
    """
    out = watch.session.out
    live = not out.as_json and out.console.is_terminal
    stays = live if stay is None else stay
    try:
        async with asyncio.timeout(timeout.total_seconds() if timeout else None):
            first = await watch.until_planned(None)
            if isinstance(first, RolloutResult):
                return tell_unplanned(out, first)
            return await (_live(watch, stays) if live else _lines(watch, stays))
    except TimeoutError:
        out.say(f"rollout {watch.name} goes on; stopped watching after {timeout}")
        return ExitStatus.WAITING
    finally:
        await watch.close()


async def _live(watch: Watch, stays: bool) -> ExitStatus:
    console = watch.session.out.console
    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
        snapshot, status = await _until_over(watch, stays, lambda seen: live.update(screen(seen), refresh=True))
    _tell_end(watch, snapshot, status)
    return status


async def _lines(watch: Watch, stays: bool) -> ExitStatus:
    """A line for each event and each change of the counts."""
    json_lines = watch.session.out.as_json
    seen, last_line, last_object = 0, "", ""

    def show(snapshot: Snapshot) -> None:
        nonlocal seen, last_line, last_object
        for event in snapshot.events:
            if event.event_no > seen:
                _emit(json_lines, {"event": event}, f"{when(event.at)}  * {event_text(event)}")
                seen = event.event_no
        line = snapshot.trouble or line_of(snapshot)
        found = as_json(object_of(snapshot)) if json_lines else ""
        if line != last_line or found != last_object:
            _emit(json_lines, {"at": snapshot.at, "rollout": object_of(snapshot)}, f"{when(snapshot.at)}  {line}")
        last_line, last_object = line, found

    snapshot, status = await _until_over(watch, stays, show)
    _tell_end(watch, snapshot, status)
    return status


async def _until_over(watch: Watch, stays: bool, show: Callable[[Snapshot], None]) -> tuple[Snapshot, ExitStatus]:
    """Show the rollout again and again until there is nothing more to watch."""
    while True:
        snapshot = await watch.look_again()
        show(snapshot)
        if (status := _over(snapshot, stays)) is not None:
            return snapshot, status
        await asyncio.sleep(POLL_SECONDS)


def _emit(json_lines: bool, data: "dict[str, object | EventView]", line: str) -> None:
    sys.stdout.write((as_json(data) if json_lines else line) + "\n")
    sys.stdout.flush()


def _over(snapshot: Snapshot, stays: bool) -> ExitStatus | None:
    """The exit status, once there is nothing more to watch."""
    if snapshot.view.outcome is not None:
        return status_of_outcome(snapshot.view.outcome)
    if snapshot.needs_person and not stays:
        return ExitStatus.WAITING
    return None


def _tell_end(watch: Watch, snapshot: Snapshot, status: ExitStatus) -> None:
    out, view = watch.session.out, snapshot.view
    if out.as_json:
        result = {
            "name": view.name,
            "outcome": view.outcome,
            "reason": snapshot.reason,
            "devices": view.devices,
            "succeeded": view.counts.succeeded,
            "failed": view.counts.failed + view.counts.timed_out + view.counts.rejected,
            "exposed": view.exposed,
            "by_delta": view.by_delta,
            "exit_status": int(status),
        }
        _emit(True, {"result": result}, "")
    if view.outcome is not None:
        out.say(f"rollout {view.name} {view.outcome}: {snapshot.reason}")
    else:
        action = MEANING.get(snapshot.phase, "rollout show")
        out.say(
            f"rollout {view.name} waits for a person ({snapshot.phase}): {snapshot.reason}; see '{action} {view.name}'"
        )


def tell_unplanned(out: Output, result: RolloutResult) -> ExitStatus:
    """Say how a rollout ended that never had a plan."""
    status = status_of_outcome(result.outcome)
    if out.as_json:
        _emit(True, {"result": {**result.model_dump(mode="json"), "exit_status": int(status)}}, "")
    out.say(f"rollout {result.name} {result.outcome}: {result.reason}")
    return status
