"""A notification as a process: each channel for itself, for up to a day, with the result of each."""

from datetime import timedelta
from uuid import uuid4

import pytest
from temporalio.client import WorkflowHandle

from models.alerting import NotifyResult
from tests.replay.notification_scenarios import ScriptedChannels, notification, telling
from tests.workflow.conftest import SkippingServers
from workflows import options
from workflows.notification import NotificationWorkflow
from workflows.notification_client import start_notification

Handle = WorkflowHandle[NotificationWorkflow, NotifyResult]


async def ended(servers: SkippingServers, script: ScriptedChannels | None) -> tuple[NotifyResult, Handle, timedelta]:
    """One notification: its result, and how long it took by the server's clock."""
    environment = await servers.get()
    async with telling(environment, script):
        handle = await start_notification(environment.client, notification(uuid4().hex))
        result = await handle.result()
        described = await handle.describe()
    assert described.close_time is not None
    return result, handle, described.close_time - described.start_time


async def outcome(handle: Handle) -> str | None:
    return (await handle.describe()).typed_search_attributes[options.OUTCOME]


async def test_all_channels_are_told(servers: SkippingServers) -> None:
    result, handle, _ = await ended(servers, ScriptedChannels({"ops": 0, "mail": 3}))
    assert {each.channel: each.delivered for each in result.deliveries} == {"ops": True, "mail": True}
    assert await outcome(handle) == "told"


async def test_a_channel_is_tried_for_a_day_and_holds_up_no_other(servers: SkippingServers) -> None:
    script = ScriptedChannels({"ops": 0, "mail": None})
    result, handle, took = await ended(servers, script)
    assert timedelta(hours=23) < took < timedelta(hours=25)
    assert script.attempts["ops"] == 1 and 100 < script.attempts["mail"] < 250
    assert [(each.channel, each.delivered) for each in result.deliveries] == [("ops", True), ("mail", False)]
    assert "cannot be reached" in result.deliveries[1].reason
    assert await outcome(handle) == "partly"


async def test_a_receiver_that_is_gone_for_good_is_not_tried_again(servers: SkippingServers) -> None:
    script = ScriptedChannels({"ops": "gone"})
    result, handle, took = await ended(servers, script)
    assert script.attempts["ops"] == 1 and took < timedelta(minutes=1)
    assert "410" in result.deliveries[0].reason and await outcome(handle) == "failed"


async def test_what_no_channel_wants_is_told_to_nobody(servers: SkippingServers) -> None:
    result, handle, _ = await ended(servers, ScriptedChannels({}))
    assert result.reason == "no channel wants it" and await outcome(handle) == "nobody"


async def test_where_no_worker_has_channels_it_ends_when_its_time_is_over(
    servers: SkippingServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "NOTIFY_LIMIT", timedelta(seconds=1))  # a server does not skip what waits for a worker
    result, handle, _ = await ended(servers, None)
    assert result.reason.startswith("no channel could be asked")
    assert await outcome(handle) == "nobody"


async def test_started_twice_it_tells_once(servers: SkippingServers) -> None:
    environment, script, digest = await servers.get(), ScriptedChannels({"ops": 0}), uuid4().hex
    async with telling(environment, script):
        for _ in range(3):
            await (await start_notification(environment.client, notification(digest))).result()
    assert script.attempts["ops"] == 1
