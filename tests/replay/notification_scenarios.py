"""Scenarios of a notification, one for each way to end, with channels from a script."""

import collections
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from temporalio import activity
from temporalio.client import WorkflowHandle
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from models.alerting import AlertEvent, ChosenChannels, DeliverInput, Delivery, NotifyInput, Severity
from workflows import options
from workflows.notification import NotificationWorkflow
from workflows.notification_client import start_notification
from workflows.sandbox import runner

NOON = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)


@dataclass
class ScriptedChannels:
    """Channels that fail so often before they take something; None: for ever. "gone": for good."""

    channels: dict[str, int | str | None] = field(default_factory=lambda: {"ops": 0, "mail": 0})
    attempts: collections.Counter[str] = field(default_factory=collections.Counter)

    @activity.defn
    async def choose_channels(self, told: NotifyInput) -> ChosenChannels:
        return ChosenChannels(names=tuple(self.channels))

    @activity.defn
    async def deliver_notification(self, asked: DeliverInput) -> Delivery:
        failures = self.channels[asked.channel]
        self.attempts[asked.channel] += 1
        if failures == "gone":
            raise ApplicationError("answered with status 410, expected 2xx", type="RefusedError")
        if failures is None or self.attempts[asked.channel] <= int(failures):
            raise ApplicationError("cannot be reached (ConnectError)", type="UnavailableError")
        return Delivery(channel=asked.channel, delivered=True)


def notification(digest: str) -> NotifyInput:
    """Of two devices."""
    return NotifyInput(
        digest=digest,
        rule="overheating",
        event=AlertEvent.OPENED,
        severity=Severity.CRITICAL,
        summary="2 devices: overheating; site berlin 2; first motor-1 at 12:00 UTC",
        count=2,
        sites={"berlin": 2},
        at=NOON,
    )


@asynccontextmanager
async def telling(environment: WorkflowEnvironment, script: ScriptedChannels | None) -> AsyncIterator[None]:
    """Workers; without a script none that has channels."""
    async with AsyncExitStack() as stack:
        queues: list[tuple[str, list[Any], list[Any]]] = [(options.TASK_QUEUE, [NotificationWorkflow], [])]
        if script is not None:
            queues.append((options.NOTIFY_QUEUE, [], [script.choose_channels, script.deliver_notification]))
        for queue, flows, activities in queues:
            worker = Worker(
                environment.client, task_queue=queue, workflows=flows, activities=activities, workflow_runner=runner()
            )
            await stack.enter_async_context(worker)
        yield


def _played(
    name: str, channels: dict[str, int | str | None] | None
) -> Callable[[WorkflowEnvironment], Awaitable[WorkflowHandle[Any, Any]]]:
    async def play(environment: WorkflowEnvironment) -> WorkflowHandle[Any, Any]:
        limit = options.NOTIFY_LIMIT
        if channels is None:
            options.NOTIFY_LIMIT = timedelta(seconds=1)  # a server does not skip what waits for a worker
        try:
            async with telling(environment, None if channels is None else ScriptedChannels(channels)):
                handle = await start_notification(environment.client, notification(f"recorded-{name}"))
                await handle.result()
        finally:
            options.NOTIFY_LIMIT = limit
        return handle

    return play


NOTIFICATION = {
    "NotificationWorkflow": {
        "told": _played("told", {"ops": 0, "mail": 2}),
        "partly": _played("partly", {"ops": 0, "mail": None, "pager": "gone"}),
        "nobody": _played("nobody", {}),
        "no-worker": _played("no-worker", None),
    }
}
