"""Reports that the broker delivers again, because the gateway died after its commit and before its acknowledgement."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiomqtt
import orjson
import pytest

from domain.admission import Ledger
from firmware.keys import save_private_key
from gateway.__main__ import CLIENT_ID
from models.protocol import jobs_topic
from store.engine import Database
from tests.conftest import Broker
from tests.integration.rollout_setup import NEW, Fleet, prepare, recount
from tests.integration.test_gateway_jobs import JOB, open_door

DYING = """
import os, signal
from gateway.service import Gateway
original = Gateway._transact
async def committed_and_dead(self, batch):
    outgoing = await original(self, batch)
    if any(inbound.topic and inbound.topic.verb == "update" for inbound in batch):
        os.kill(os.getpid(), signal.SIGKILL)
    return outgoing
Gateway._transact = committed_and_dead
from gateway.__main__ import main
main()
"""
LONG_SECONDS = 60
STEP = {"status": "IN_PROGRESS", "statusDetails": {"step": "installing"}}


def dying_gateway(db: Database, broker: Broker, fleet: Fleet, folder: Path) -> subprocess.Popen[bytes]:
    """The real process, which dies in the moment after it has committed an update."""
    save_private_key(folder / "order.pem", fleet.order_key)
    environment = os.environ | {
        "TIDEGATE_DATABASE_URL": db.url,
        "TIDEGATE_MQTT_URL": f"mqtt://{broker.host}:{broker.port}",
        "TIDEGATE_ARTIFACT_URL": "http://127.0.0.1:1/",
        "TIDEGATE_ORDER_KEY": str(folder / "order.pem"),
        "TIDEGATE_STATE_DIR": str(folder),
    }
    return subprocess.Popen([sys.executable, "-c", DYING], env=environment)


async def execution(db: Database) -> tuple[Any, ...]:
    async with db.pool.connection() as connection:
        cursor = await connection.execute(
            "SELECT state, version_number, status_details FROM executions WHERE device_id = 'motor-1'"
        )
        row = await cursor.fetchone()
    assert row is not None
    return row


@asynccontextmanager
async def forgotten(broker: Broker) -> AsyncIterator[None]:
    """Without what the broker keeps for the gateway's client id, before and after."""

    async def forget() -> None:
        async with aiomqtt.Client(broker.host, broker.port, identifier=CLIENT_ID, clean_session=True):
            pass

    await forget()
    try:
        yield
    finally:
        await forget()


async def report_and_kill(client: aiomqtt.Client, gateway: subprocess.Popen[bytes], body: dict[str, Any]) -> None:
    """A device reports; the gateway commits, and is gone before it acknowledges."""
    try:
        await client.publish(jobs_topic("motor-1", JOB, "update"), orjson.dumps(body), qos=1)
        code = await asyncio.wait_for(asyncio.to_thread(gateway.wait), LONG_SECONDS)
    finally:
        if gateway.poll() is None:
            gateway.kill()
            gateway.wait()
    assert code == -signal.SIGKILL


@dataclass(frozen=True)
class ToldAgain:
    """What became of a report that was delivered again: the answer, and the execution after each delivery."""

    answer: dict[str, Any]
    first: tuple[Any, ...]
    then: tuple[Any, ...]


async def told_again(db: Database, broker: Broker, folder: Path, body: dict[str, Any]) -> ToldAgain:
    """One report, a gateway that dies between commit and acknowledgement, and the next one."""
    fleet, token = await prepare(db, 2), body["clientToken"]
    async with (
        forgotten(broker),
        aiomqtt.Client(broker.host, broker.port, protocol=aiomqtt.ProtocolVersion.V311) as client,
    ):
        async with open_door(db, broker, fleet, CLIENT_ID) as door:
            assert (await door.ask("motor-1", "start-next"))[0]
        await client.subscribe(jobs_topic("motor-1", JOB, "update", "+"), qos=0)
        await report_and_kill(client, dying_gateway(db, broker, fleet, folder), body)
        first = await execution(db)
        async with open_door(db, broker, fleet, CLIENT_ID):
            async with asyncio.timeout(LONG_SECONDS):
                async for message in client.messages:
                    answer = orjson.loads(message.payload)
                    if answer["clientToken"] == token:
                        break
        assert await recount(db, fleet.plan.job_no) == []
        return ToldAgain(answer, first, await execution(db))


@pytest.mark.parametrize(
    "body",
    [
        STEP,
        STEP | {"expectedVersion": 2, "executionNumber": 1},
        {"status": "SUCCEEDED", "statusDetails": {"version": "1.3.0", "sha256": NEW, "slot": "b"}},
        {"status": "FAILED", "statusDetails": {"failure": "flash", "reason": "worn out"}, "expectedVersion": "2"},
    ],
    ids=["step", "step-with-version", "success", "failure-with-version"],
)
async def test_a_report_that_is_delivered_again_is_answered_like_the_first_time_and_changes_nothing(
    db: Database, broker: Broker, tmp_path: Path, body: dict[str, Any]
) -> None:
    found = await told_again(db, broker, tmp_path, body | {"clientToken": "t", "includeJobExecutionState": True})
    assert found.first[1] == 3, "it was committed before the gateway died"
    assert found.then == found.first
    assert "code" not in found.answer
    state = found.answer["executionState"]
    assert (state["status"], state["versionNumber"]) == (body["status"], 3)


async def test_without_the_look_at_what_was_applied_a_report_is_refused_or_applied_twice(
    db: Database, broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ledger, "has_applied", lambda *_: False)
    found = await told_again(db, broker, tmp_path, STEP | {"clientToken": "t"})
    assert (found.first[1], found.then[1]) == (3, 4)
