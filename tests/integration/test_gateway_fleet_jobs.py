"""Fleet jobs at the devices' door: signed tasks, attempts that a device cannot begin early, several jobs for one device."""

import asyncio
from typing import Any

import orjson
import pytest

import domain.admission
import models.documents
from firmware.keys import generate_private_key
from firmware.task import VerifiedTask, verify_task
from models.rollout import PlanRolloutInput
from store.configurations import set_desired
from store.engine import Database
from store.fleetjobs import FleetJobStore
from store.rollouts import RolloutStore
from tests.conftest import Broker
from tests.integration.jobs_setup import job, miscounted, plan_job
from tests.integration.rollout_setup import Fleet, add_devices, add_release, specification
from tests.integration.test_gateway_jobs import Door, open_door


async def site(db: Database, devices: int) -> Fleet:
    """Devices and keys; a rollout to one device that is no part of any test, because the door wants a fleet."""
    release_key, order_key, store = generate_private_key(), generate_private_key(), RolloutStore(db)
    await add_devices(db, devices)
    await add_devices(db, 1, "other")
    await add_release(db, release_key)
    spec = specification(target={"ids": ["other-1"]})
    return Fleet(store, await store.plan(PlanRolloutInput(spec=spec)), spec, release_key, order_key)


def verified(door: Door, execution: dict[str, Any], now: int) -> VerifiedTask:
    """The task of an execution, as its device verifies it."""
    return verify_task(
        execution["jobDocument"]["order"],
        door.fleet.trusted,
        execution["thingName"],
        frozenset(),
        now,
        job_id=execution["jobId"],
        attempt=execution["executionNumber"],
    )


async def test_a_device_fails_is_answered_so_and_gets_the_next_attempt_when_it_is_due(
    db: Database, broker: Broker
) -> None:
    fleet = await site(db, 2)
    spec = job("try", "custom", document={"blink": 3}, retry={"max_attempts": 2, "backoff": "1s"})
    plan = await plan_job(db, spec)
    async with open_door(db, broker, fleet) as door:
        _, started = await door.ask("motor-1", "start-next")
        execution = started["execution"]
        task = verified(door, execution, int(started["timestamp"])).task
        assert (task.operation, task.payload, task.attempt) == ("custom", {"blink": 3}, 1)
        assert {**execution["jobDocument"], "order": 0} == {"operation": "custom", "blink": 3, "order": 0}
        accepted, failed = await door.ask(
            "motor-1", "_try", "update", status="FAILED", statusDetails={"failure": "internal"},
            includeJobExecutionState=True, includeJobDocument=True,
        )  # fmt: skip
        assert accepted and "jobDocument" not in failed, "no order for an attempt that nobody has admitted"
        assert failed["executionState"] == {
            "status": "FAILED", "statusDetails": {"failure": "internal"}, "versionNumber": 3,
        }  # fmt: skip
        assert "execution" not in await door.wait_for("motor-1", "jobs/notify-next")
        _, early = await door.ask("motor-1", "start-next")
        assert "execution" not in early
        _, listed = await door.ask("motor-1", "get")
        assert listed["queuedJobs"] == listed["inProgressJobs"] == []
        accepted, sneaky = await door.ask("motor-1", "_try", "update", status="IN_PROGRESS")
        assert not accepted and sneaky["code"] == "RequestThrottled"
        accepted, late = await door.ask("motor-1", "_try", "update", status="SUCCEEDED", executionNumber=1)
        assert not accepted and late["code"] == "TerminalStateReached"
        async with asyncio.timeout(30):
            while "execution" not in (again := (await door.ask("motor-1", "start-next"))[1]):
                await asyncio.sleep(0.05)
        assert (again["execution"]["executionNumber"], again["execution"]["versionNumber"]) == (2, 2)
        assert verified(door, again["execution"], int(again["timestamp"])).task.attempt == 2
        accepted, _ = await door.ask("motor-1", "_try", "update", status="SUCCEEDED", executionNumber=2)
        assert accepted
    view = await FleetJobStore(db).get("try")
    assert (view.progress.succeeded, view.progress.attempts_failed) == (1, 1)
    assert await miscounted(db, plan.job_no) == []


async def test_a_device_with_several_jobs_is_given_one_after_the_other(db: Database, broker: Broker) -> None:
    fleet = await site(db, 1)
    await plan_job(db, job("one", "custom"))
    await plan_job(db, job("two"))
    async with open_door(db, broker, fleet) as door:
        _, listed = await door.ask("motor-1", "get")
        assert [entry["jobId"] for entry in listed["queuedJobs"]] == ["_one", "_two"]
        for name, operation in (("_one", "custom"), ("_two", "restart")):
            _, started = await door.ask("motor-1", "start-next")
            assert started["execution"]["jobId"] == name
            assert verified(door, started["execution"], int(started["timestamp"])).task.operation == operation
            _, same = await door.ask("motor-1", "start-next")
            assert same["execution"]["jobId"] == name, "what is in progress comes first"
            accepted, _ = await door.ask("motor-1", name, "update", status="SUCCEEDED")
            assert accepted
        _, nothing = await door.ask("motor-1", "start-next")
        assert "execution" not in nothing


async def test_documents_say_what_is_one_devices_alone(db: Database, broker: Broker) -> None:
    fleet = await site(db, 1)
    async with db.pool.connection() as connection:
        await set_desired(connection, "motor-1", {"interval": 1}, "bob")
    await plan_job(db, job("sync", "config-sync", config={"interval": 5}))
    await plan_job(db, job("look", "diagnostic", diagnostics=["ping"]))
    async with open_door(db, broker, fleet) as door:
        _, started = await door.ask("motor-1", "start-next")
        assert verified(door, started["execution"], int(started["timestamp"])).task.payload == {"configVersion": 2}
        await door.ask("motor-1", "_sync", "update", status="SUCCEEDED", statusDetails={"configVersion": "2"})
        _, started = await door.ask("motor-1", "start-next")
        payload = verified(door, started["execution"], int(started["timestamp"])).task.payload
    async with db.pool.connection() as connection:
        kept = await (await connection.execute("SELECT request_id, type FROM diagnostics")).fetchall()
    assert payload == {"requests": [{"requestId": request_id, "type": what} for request_id, what in kept]}
    assert [what for _, what in kept] == ["ping"]
    assert (await FleetJobStore(db).get("sync")).progress.succeeded == 1


async def test_the_largest_document_fits_a_message_with_its_order(db: Database, broker: Broker) -> None:
    fleet = await site(db, 1)
    await plan_job(db, job("large", "custom", document={"text": "x" * (12 * 1024 - 11)}))
    async with open_door(db, broker, fleet) as door:
        _, started = await door.ask("motor-1", "start-next")
        assert len(orjson.dumps(started)) < 32 * 1024
        assert len(verified(door, started["execution"], int(started["timestamp"])).task.payload["text"]) > 12_000


async def test_without_the_rule_about_time_a_device_could_begin_early(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = await site(db, 1)
    await plan_job(db, job("try", "custom", retry={"max_attempts": 2, "backoff": "1h"}))
    monkeypatch.setattr(domain.admission.JobRow, "pause_after", lambda self, attempt: -1.0)
    async with open_door(db, broker, fleet) as door:
        await door.ask("motor-1", "start-next")
        await door.ask("motor-1", "_try", "update", status="FAILED")
        accepted, _ = await door.ask("motor-1", "_try", "update", status="IN_PROGRESS")
        assert accepted


async def started_with(db: Database, broker: Broker, document: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether a device can begin a custom job with this document."""
    fleet = await site(db, 1)
    await plan_job(db, job("large", "custom", document=document))
    async with open_door(db, broker, fleet) as door:
        return await door.ask("motor-1", "start-next")


async def test_a_number_that_postgresql_gives_back_as_an_integer_is_refused_before_it_is_planned(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"x: the number 1e\+16 is beyond 2\*\*53 - 1"):
        job("large", "custom", document={"x": 1e16})
    monkeypatch.setattr(models.documents, "MAX_INTEGER", 2.0**70)
    accepted, answer = await started_with(db, broker, {"x": 1e16})
    assert not accepted and answer["code"] == "InternalError", "no device could begin it"


async def test_a_large_number_within_what_every_parser_reads_reaches_the_device(db: Database, broker: Broker) -> None:
    accepted, answer = await started_with(db, broker, {"x": 9007199254740991.0, "y": 1e-300})
    assert accepted and answer["execution"]["jobDocument"]["x"] == 9007199254740991
