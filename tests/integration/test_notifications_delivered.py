"""Alerts reach a real receiver, through a real PostgreSQL and a real Temporal: grouped, signed, at least once."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import pytest_asyncio
from standardwebhooks.webhooks import Webhook, WebhookVerificationError
from temporalio.api.enums.v1 import EventType
from temporalio.service import RPCError, RPCStatusCode
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

import activities.notification_relay
import activities.notifying
from access.keeper import ACCESS, HALF_LIFE
from activities.channels import load_channels
from activities.notification_relay import QUIET, NotificationRelay
from activities.notifying import NotifyingActivities
from models.alerting import BUILT_IN, AlertRuleSpec, NotifyInput, NotifyResult
from models.ids import notify_workflow_id
from models.protocol import heartbeat_topic
from store.alert_rules import AlertRuleStore
from store.alerts import AlertStore, raise_alert, resolve_alert, settle_alerts
from store.engine import Database, migrate
from store.notifications import NotificationStore
from store.retention import delete_old
from store.rotation import ENDING_ALERT
from tests.cli_runner import run
from tests.conftest import Broker
from tests.integration.notification_setup import PATH_SECRET, SECRET, WRONG, Receiver, channels, hot, taken
from tests.integration.rollout_setup import add_devices, prepare
from tests.integration.test_gateway_identity import rows, until
from tests.integration.test_gateway_jobs import open_door
from tests.temporal_server import development_server
from worker import notification_relay
from workers.queues import notify_worker
from workflows import options
from workflows.notification import NotificationWorkflow
from workflows.sandbox import runner

SOON = timedelta(0)
APPRISE = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")
"""Apprise imports it before it looks whether there is another."""


@pytest_asyncio.fixture(scope="module")
async def server() -> AsyncIterator[WorkflowEnvironment]:
    """A development server with a worker for workflows alone."""
    async with development_server() as environment:
        async with Worker(
            environment.client,
            task_queue=options.TASK_QUEUE,
            workflows=[NotificationWorkflow],
            workflow_runner=runner(),
        ):
            yield environment


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow one another soon, and a relay looks often."""
    patient = options.NOTIFY_RETRY
    quick = type(patient)(
        initial_interval=timedelta(milliseconds=100),
        maximum_interval=timedelta(milliseconds=500),
        non_retryable_error_types=patient.non_retryable_error_types,
    )
    monkeypatch.setattr(options, "NOTIFY_RETRY", quick)
    monkeypatch.setattr(activities.notification_relay, "POLL_SECONDS", 0.05)


@asynccontextmanager
async def telling(
    db: Database, server: WorkflowEnvironment, file: Path, gather: timedelta = SOON
) -> AsyncIterator[NotificationRelay]:
    """A worker with channels, and its relay."""
    notifying, stop = NotifyingActivities(load_channels(file)), asyncio.Event()
    relay = notification_relay(db, server.client, notifying)
    relay.gather, relay.quiet = gather, gather
    async with notify_worker(server.client, notifying):
        running = asyncio.create_task(relay.run(stop))
        try:
            yield relay
        finally:
            stop.set()
            await asyncio.wait_for(running, 20)


async def result(db: Database, server: WorkflowEnvironment, rule: str = "overheating") -> NotifyResult:
    async def digest() -> Any:
        return await rows(
            db,
            "SELECT digest FROM alert_notifications JOIN alerts USING (alert_no) WHERE rule = %s AND digest <> ''",
            rule,
        )

    [[found], *_] = await until(digest, 20)
    handle = server.client.get_workflow_handle_for(NotificationWorkflow.run, notify_workflow_id(found))
    return await asyncio.wait_for(handle.result(), 40)


async def test_a_receiver_that_fails_twice_is_told_and_can_check_who_tells_it(
    db: Database, server: WorkflowEnvironment, receiver: Receiver, tmp_path: Path
) -> None:
    receiver.failures = 2
    await add_devices(db, 3)
    async with telling(db, server, channels(tmp_path, receiver)):
        await hot(db, 1)
        [told] = await taken(receiver, 1)
        ended = await result(db, server)
    assert told["type"] == "alert.opened" and told["data"]["summary"].startswith("motor-1: overheating at ")
    assert told["data"]["sites"] == {"berlin": 1} and told["data"]["alerts"][0]["subject"] == "motor-1"
    assert [(each.channel, each.delivered) for each in ended.deliveries] == [("ops", True)]
    assert len(receiver.requests) == 3
    for headers, body in receiver.requests:
        assert Webhook(SECRET).verify(body, headers)["data"]["digest"] == headers["webhook-id"] == ended.digest
        with pytest.raises(WebhookVerificationError):
            Webhook(WRONG).verify(body, headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(body.replace(b"motor-1", b"motor-2"), headers)


async def test_signed_with_another_secret_it_is_not_believed(
    db: Database, server: WorkflowEnvironment, receiver: Receiver, tmp_path: Path
) -> None:
    async with telling(db, server, channels(tmp_path, receiver, secret=WRONG)):
        await hot(db, 1)
        await taken(receiver, 1)
    headers, body = receiver.requests[0]
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body, headers)


async def test_three_hundred_alerts_are_few_notifications(
    db: Database, server: WorkflowEnvironment, receiver: Receiver, tmp_path: Path
) -> None:
    await add_devices(db, 300)
    async with telling(db, server, channels(tmp_path, receiver), gather=timedelta(seconds=2)):
        await hot(db, 300)

        async def all_told() -> bool:
            return sum(told["data"]["count"] for told in receiver.taken) == 300

        await until(all_told, 60)
    assert len(receiver.taken) <= 5
    largest = max((told["data"] for told in receiver.taken), key=lambda data: data["count"])
    assert "devices: overheating; site berlin" in largest["summary"]
    assert len(largest["alerts"]) == 20 and largest["more"] == largest["count"] - 20
    assert await rows(db, "SELECT FROM alert_notifications WHERE handed_over_at IS NULL") == []


async def test_what_goes_on_is_told_together_and_not_so_often(db: Database) -> None:
    store, soon, later = NotificationStore(db), timedelta(0), timedelta(hours=1)
    await hot(db, 2)
    [first] = await store.digests(soon, later)
    assert first.count == 2
    assert await store.handed_over(first.digest) == 2
    async with db.pool.connection() as connection:
        await raise_alert(connection, "overheating", "motor-9", "hot")
        await raise_alert(connection, "loaded", "motor-9", "busy")
    assert [told.rule for told in await store.digests(soon, later)] == ["loaded"], "the other was told just before"
    assert sorted(told.rule for told in await store.digests(soon, soon)) == ["loaded", "overheating"]


async def test_tidegate_s_own_alerts_are_told_too_and_so_is_their_end(
    db: Database, server: WorkflowEnvironment, receiver: Receiver, tmp_path: Path
) -> None:
    async with telling(db, server, channels(tmp_path, receiver)):
        async with db.pool.connection() as connection:
            await raise_alert(connection, ENDING_ALERT, "motor-1", "its certificate ends in 3 days")
            found = {(HALF_LIFE, "mosquitto/issuing"): "the list is past half of its life"}
            await settle_alerts(connection, (HALF_LIFE,), "mosquitto/", found, actor=ACCESS)
        await taken(receiver, 2)
        async with db.pool.connection() as connection:
            await settle_alerts(connection, (HALF_LIFE,), "mosquitto/", {}, actor=ACCESS)
            await resolve_alert(connection, ENDING_ALERT, "motor-1", "rotation")
        told = await taken(receiver, 4)
    assert {(one["type"], one["data"]["rule"], one["data"]["severity"]) for one in told} == {
        ("alert.opened", "certificate-ending", "warning"),
        ("alert.opened", "crl-half-life", "critical"),
        ("alert.resolved", "certificate-ending", "warning"),
        ("alert.resolved", "crl-half-life", "critical"),
    }


async def test_an_acknowledged_alert_that_recurs_is_not_told_again(
    db: Database, server: WorkflowEnvironment, receiver: Receiver, tmp_path: Path
) -> None:
    async with telling(db, server, channels(tmp_path, receiver)):
        await hot(db, 1)
        await taken(receiver, 1)
        await AlertStore(db).acknowledge([1], "alice")
        await hot(db, 1)
        await hot(db, 1, "loaded")
        told = await taken(receiver, 2)
    assert [one["data"]["rule"] for one in told] == ["overheating", "loaded"]
    assert await rows(db, "SELECT state, occurrences FROM alerts WHERE rule = 'overheating'") == [("acknowledged", 2)]


@APPRISE
async def test_a_channel_that_fails_holds_up_no_other_and_no_secret_leaves_the_worker(
    db: Database,
    server: WorkflowEnvironment,
    receiver: Receiver,
    tmp_path: Path,
    monkeypatch: Any,
    caplog: Any,
    capsys: Any,
) -> None:
    monkeypatch.setattr(options, "NOTIFY_LIMIT", timedelta(seconds=4))
    gone = f"http://127.0.0.1:1{PATH_SECRET}"
    file = tmp_path / "notify.yaml"
    good = {"name": "ops", "kind": "webhook", "url": receiver.url, "secret": SECRET}
    file.write_text(
        json.dumps(
            {
                "channels": [
                    good | {"name": "away", "url": gone},
                    {"name": "mail", "kind": "apprise", "url": "json://user:pass-secret@127.0.0.1:1/path-secret"},
                    good,
                ]
            }
        )
    )
    file.chmod(0o600)
    async with telling(db, server, file):
        await hot(db, 1)
        await taken(receiver, 1)
        ended = await result(db, server)
    assert {each.channel: each.delivered for each in ended.deliveries} == {"away": False, "mail": False, "ops": True}
    assert all(each.reason for each in ended.deliveries if not each.delivered)
    handle = server.client.get_workflow_handle(notify_workflow_id(ended.digest))
    history = (await handle.fetch_history()).to_json()
    caught = capsys.readouterr()
    stored = str(await rows(db, "SELECT a, n FROM alerts a JOIN alert_notifications n USING (alert_no)"))
    for secret in ("path-secret", "pass-secret", SECRET.removeprefix("whsec_")):
        assert secret not in history + caplog.text + caught.out + caught.err + stored
    described = await handle.describe()
    assert described.typed_search_attributes[options.OUTCOME] == "partly"


@APPRISE
async def test_apprise_delivers_and_says_so(
    db: Database, server: WorkflowEnvironment, receiver: Receiver, tmp_path: Path
) -> None:
    file = tmp_path / "notify.yaml"
    url = receiver.url.replace("http://", "json://")
    file.write_text(json.dumps({"channels": [{"name": "any", "kind": "apprise", "url": url}]}))
    file.chmod(0o600)
    async with telling(db, server, file):
        await hot(db, 1)
        [told] = await taken(receiver, 1)
        assert (await result(db, server)).deliveries[0].delivered
    assert told["title"].startswith("[warning] motor-1: overheating") and "cpuTemperature is 99" in told["message"]


async def test_a_redirect_is_not_followed(
    db: Database, server: WorkflowEnvironment, receiver: Receiver, tmp_path: Path
) -> None:
    asked = NotifyInput.model_validate(
        {"digest": "d", "rule": "r", "event": "opened", "severity": "info", "summary": "s", "count": 0, "at": 0}
    )

    class Redirecting(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(307)
            self.send_header("location", receiver.url)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

    elsewhere = ThreadingHTTPServer(("127.0.0.1", 0), Redirecting)
    threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{elsewhere.server_address[1]}/"
    channel = load_channels(channels(tmp_path, receiver, url=url))["ops"]
    assert await activities.notifying._attempt(channel, asked) == ("answered with status 307, expected 2xx", False)
    assert receiver.requests == []
    elsewhere.shutdown()
    elsewhere.server_close()


# --- those who tell are killed ---------------------------------------------------------------------------------------


class KilledBeforeStart(NotificationRelay):
    """Ends when the digest has been written, and its workflow not yet started."""

    async def hand_over(self) -> int:
        await self.store.digests(self.gather, self.quiet)
        raise asyncio.CancelledError


class KilledAfterStart(NotificationRelay):
    """Ends when the workflow has been started, and that not yet written."""

    async def hand_over(self) -> int:
        for told in await self.store.digests(self.gather, self.quiet):
            assert self.start is not None
            await self.start(told)
        raise asyncio.CancelledError


class Careless(NotificationRelay):
    """Writes that it was handed over first."""

    async def hand_over(self) -> int:
        for told in await self.store.digests(self.gather, self.quiet):
            await self.store.handed_over(told.digest)
        raise asyncio.CancelledError


@pytest.mark.parametrize("kind", [KilledBeforeStart, KilledAfterStart])
async def test_a_relay_killed_on_the_way_is_followed_by_one_that_tells_the_same_once(
    db: Database, server: WorkflowEnvironment, receiver: Receiver, tmp_path: Path, kind: Any
) -> None:
    file = channels(tmp_path, receiver)
    await hot(db, 5)
    first = kind(
        NotificationStore(db), notification_relay(db, server.client, NotifyingActivities({})).start, SOON, SOON
    )
    with pytest.raises(asyncio.CancelledError):
        await first.hand_over()
    async with telling(db, server, file):
        [told] = await taken(receiver, 1)
        await result(db, server)
        handed = "SELECT FROM alert_notifications WHERE handed_over_at IS NULL"
        await until(lambda: _none(db, handed))
    assert told["data"]["count"] == 5 and len(receiver.taken) == 1


async def test_a_relay_that_notes_first_loses_what_it_held(
    db: Database, server: WorkflowEnvironment, receiver: Receiver, tmp_path: Path
) -> None:
    await hot(db, 5)
    start = notification_relay(db, server.client, NotifyingActivities({})).start
    with pytest.raises(asyncio.CancelledError):
        await Careless(NotificationStore(db), start, SOON, SOON).hand_over()
    async with telling(db, server, channels(tmp_path, receiver)):
        await hot(db, 1, "loaded")
        told = await taken(receiver, 1)
    assert [one["data"]["rule"] for one in told] == ["loaded"]


async def _none(db: Database, sql: str) -> bool:
    return not await rows(db, sql)


async def test_two_relays_tear_nothing_apart(
    db: Database, server: WorkflowEnvironment, receiver: Receiver, tmp_path: Path
) -> None:
    await hot(db, 40)
    file = channels(tmp_path, receiver)
    async with telling(db, server, file) as relay:
        others = [NotificationRelay(relay.store, relay.start, SOON, SOON) for _ in range(3)]
        for _ in range(20):
            await asyncio.gather(*(other.hand_over() for other in others))
        await taken(receiver, 1)
        await until(lambda: _none(db, "SELECT FROM alert_notifications WHERE handed_over_at IS NULL"))
    assert [told["data"]["count"] for told in receiver.taken] == [40]


def worker_process(address: str, file: Path) -> subprocess.Popen[bytes]:
    """A worker that tells, and nothing else, to be killed."""
    return subprocess.Popen([sys.executable, "-m", "tests.chaos.notifying_worker", address, str(file)])


async def test_a_worker_killed_in_the_middle_of_a_delivery_is_followed_by_another(
    db: Database, server: WorkflowEnvironment, receiver: Receiver, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(options, "NOTIFY_TIMEOUT", timedelta(seconds=3))
    file = channels(tmp_path, receiver)
    address = server.client.service_client.config.target_host
    doomed = worker_process(address, file)

    def kill() -> None:
        os.kill(doomed.pid, signal.SIGKILL)
        doomed.wait()

    receiver.failures, receiver.on_request = 1, kill
    try:
        await hot(db, 1)
        start = notification_relay(db, server.client, NotifyingActivities({})).start
        assert await NotificationRelay(NotificationStore(db), start, SOON, SOON).hand_over() == 1

        async def died() -> bool:
            return doomed.poll() is not None

        await until(died, 60)
        receiver.on_request = lambda: None
        assert receiver.taken == []
        async with telling(db, server, file):
            [told] = await taken(receiver, 1)
            await result(db, server)
        assert told["data"]["summary"].startswith("motor-1: overheating")
    finally:
        doomed.kill()
        doomed.wait()


async def test_a_receiver_that_does_not_answer_holds_up_no_heartbeat(
    db: Database, server: WorkflowEnvironment, receiver: Receiver, broker: Broker, tmp_path: Path
) -> None:
    asked, answered = threading.Event(), threading.Event()

    def hang() -> None:
        asked.set()
        answered.wait(15)

    receiver.on_request = hang
    fleet = await prepare(db, 3)
    await AlertRuleStore(db).set(AlertRuleSpec.model_validate({"name": "hot", "when": "cpuTemperature > 80"}), "alice")
    try:
        async with open_door(db, broker, fleet) as door, telling(db, server, channels(tmp_path, receiver)):
            await door.client.publish(heartbeat_topic("motor-1"), b'{"cpuTemperature": 99}', qos=1)
            assert await asyncio.to_thread(asked.wait, 20)
            for number in range(200):
                said = json.dumps({"cpuTemperature": 99, "uptime": number})
                await door.client.publish(heartbeat_topic("motor-2"), said, qos=1)
            accepted, _ = await door.ask("motor-3", "get")
            assert accepted and receiver.taken == [], "the receiver has not answered yet"
            counted = "SELECT occurrences FROM alerts WHERE subject = 'motor-2'"
            assert await rows(db, counted) == [(200,)]
            answered.set()
            await taken(receiver, 1)
    finally:
        answered.set()


async def test_temporal_away_keeps_what_is_to_be_told(
    db: Database, server: WorkflowEnvironment, receiver: Receiver, tmp_path: Path, monkeypatch: Any
) -> None:
    async with telling(db, server, channels(tmp_path, receiver)) as relay:
        start, refused = relay.start, []

        async def away(told: NotifyInput) -> None:
            refused.append(told)
            raise RPCError("away", RPCStatusCode.UNAVAILABLE, b"")

        relay.start = away
        await hot(db, 1)

        async def often() -> bool:
            return len(refused) >= 3

        await until(often)
        relay.start = start
        await taken(receiver, 1)
    assert len({told.digest for told in refused}) == 1


async def test_without_a_notify_file_nothing_piles_up(db: Database, monkeypatch: Any) -> None:
    await hot(db, 3)
    relay = NotificationRelay(NotificationStore(db), None)
    assert await relay.hand_over() == 0
    assert len(await rows(db, "SELECT FROM alert_notifications WHERE handed_over_at IS NULL")) == 3, (
        "others may have one"
    )
    monkeypatch.setattr(activities.notification_relay, "LEAVE", timedelta(0))
    await relay.hand_over()
    assert await rows(db, "SELECT DISTINCT digest, handed_over_at IS NULL FROM alert_notifications") == [
        ("none", False)
    ]
    assert await delete_old(db, timedelta(0)) == {"alert_notifications": 3}


async def told_after_a_quiet_minute(db: Database) -> list[str]:
    """A rule was told of just now, and a device more has waited its minute. A worker without a notify file looks first."""
    told: list[str] = []

    async def start(notification: NotifyInput) -> None:
        told.extend(alert.subject for alert in notification.alerts)

    relay, other = (NotificationRelay(NotificationStore(db), each) for each in (start, None))
    await hot(db, 1)
    await rows(db, "UPDATE alert_notifications SET at = at - interval '10 s' RETURNING 1")
    await relay.hand_over()
    await hot(db, 2)
    await rows(db, "UPDATE alert_notifications SET at = at - %s WHERE handed_over_at IS NULL RETURNING 1", QUIET)
    await other.hand_over()
    await relay.hand_over()
    return told


async def test_a_worker_without_a_notify_file_takes_nothing_from_one_that_has_it(db: Database) -> None:
    assert await told_after_a_quiet_minute(db) == ["motor-1", "motor-2"]


async def test_if_it_waited_no_longer_than_the_other_people_would_not_be_told(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activities.notification_relay, "LEAVE", QUIET)
    assert await told_after_a_quiet_minute(db) == ["motor-1"]


async def test_a_channel_is_tested_through_a_workflow(
    db: Database, server: WorkflowEnvironment, receiver: Receiver, tmp_path: Path
) -> None:
    file = channels(tmp_path, receiver, min_severity="critical")
    environment = {"TIDEGATE_TEMPORAL_ADDRESS": server.client.service_client.config.target_host}

    async def test(name: str) -> Any:
        return await asyncio.to_thread(
            run, "alert", "channel", "test", name, "--state", tmp_path, TIDEGATE_ACTOR="carol", **environment
        )

    async with telling(db, server, file):
        ran = await test("ops")
        assert ran.status == 0 and "ops has taken the test" in ran.out, ran.err
        missing = await test("nobody")
        assert missing.status == 1 and "no channel nobody" in missing.err
    assert receiver.taken[0]["data"]["summary"] == (
        "a test of the channel ops, asked for by carol; no alert stands behind it"
    )


async def test_a_workflow_s_history_is_short(
    db: Database, server: WorkflowEnvironment, receiver: Receiver, tmp_path: Path
) -> None:
    receiver.failures = 8
    async with telling(db, server, channels(tmp_path, receiver)):
        await hot(db, 1)
        await taken(receiver, 1)
        ended = await result(db, server)
    history = await server.client.get_workflow_handle(notify_workflow_id(ended.digest)).fetch_history()
    kinds = [event.event_type for event in history.events]
    assert kinds.count(EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED) == 2 and len(kinds) < 25


def test_the_rules_to_begin_with_are_in_a_new_database(database_url: str) -> None:
    fresh = urlsplit(database_url)._replace(path="/first_rules").geturl()
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS first_rules")
        connection.execute("CREATE DATABASE first_rules")
    migrate(fresh)
    with psycopg.connect(fresh) as connection:
        found = connection.execute("SELECT spec FROM alert_rules ORDER BY name DESC").fetchall()
    assert [AlertRuleSpec.model_validate(spec) for [spec] in found] == list(BUILT_IN)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("DROP DATABASE first_rules WITH (FORCE)")
