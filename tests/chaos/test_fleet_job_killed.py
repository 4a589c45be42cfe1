"""`kill -9` of the worker, the gateway and Temporal in the middle of a fleet job: it ends as if nothing had been.

A whole embedded stack with its real worker and gateway, three hundred devices that verify their orders, and real signals.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from devstack.stack import EmbeddedStack
from firmware.keys import TrustedKeys, generate_private_key, load_public_key
from models.fleetjob import FleetJobResult, StartFleetJobInput
from models.rollout import Outcome
from models.settings import Settings
from store.engine import Database
from store.fleetjobs import FleetJobStore
from tests.integration.job_devices import JobDevice, Worked, most_at_once
from tests.integration.jobs_setup import adds_up, job, miscounted
from tests.integration.rollout_setup import add_devices
from workflows.client import connect
from workflows.fleet_jobs_client import start_fleet_job

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

DEVICES, CAP = 300, 10


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedStack]:
    state = tmp_path_factory.mktemp("chaos-jobs")
    async with EmbeddedStack(state, settings=Settings(state_dir=state), open_mqtt=True) as running:
        yield running


async def connected(stack: EmbeddedStack, prefix: str, log: list[Worked]) -> list[JobDevice]:
    """Devices of which every tenth fails in its first attempt."""
    order_key = load_public_key(Path(str(stack.endpoints.order_key)).with_suffix(".pub"))
    trusted = TrustedKeys.of(release=[generate_private_key().public_key()], order=[order_key])
    devices = [
        JobDevice(f"{prefix}-{i}", trusted, lambda attempt, i=i: i % 10 == 0 and attempt == 1, log)
        for i in range(1, DEVICES + 1)
    ]
    broker = urlsplit(str(stack.endpoints.open_mqtt_url))
    await asyncio.gather(*(device.connect(str(broker.hostname), int(broker.port or 0)) for device in devices))
    return devices


@pytest.mark.parametrize("victims", [("worker",), ("gateway",), ("gateway", "worker", "temporal")], ids="-".join)
async def test_a_job_ends_with_every_attempt_counted_once(stack: EmbeddedStack, victims: tuple[str, ...]) -> None:
    name, log = "-".join(victims), []
    db = Database(str(stack.endpoints.database_url))
    await db.open()
    await add_devices(db, DEVICES, name)
    devices = await connected(stack, name, log)
    try:
        client = await connect(str(stack.endpoints.temporal_address))
        spec = job(
            f"job-{name}",
            "custom",
            target={"ids": [f"{name}-{i}" for i in range(1, DEVICES + 1)]},
            max_parallel=CAP,
            retry={"max_attempts": 2, "backoff": "1s"},
            waves=[{"name": "some", "size": "20%"}, {"name": "all", "size": "100%"}],
        )
        handle = await start_fleet_job(client, StartFleetJobInput(spec=spec, requested_by="test"))
        store = FleetJobStore(db)
        async with asyncio.timeout(60):
            while not (views := await store.list()) or views[0].name != spec.name or views[0].progress.succeeded < 90:
                await asyncio.sleep(0.05)
        assert views[0].progress.waiting > 50, "the job was over before anything could be killed"
        for victim in victims:
            stack.kill(victim)
        await asyncio.sleep(1.0)
        for victim in reversed(victims):
            await stack.start(victim)
        client = await connect(str(stack.endpoints.temporal_address))
        ended = client.get_workflow_handle(handle.id, result_type=FleetJobResult)
        result = await asyncio.wait_for(ended.result(), 150)
        view = await store.get(spec.name)
        failed = await store.failures(spec.name, limit=DEVICES)
        assert await miscounted(db, view.job_no) == []
    finally:
        for device in devices:
            device.close()
        await db.close()
    assert (result.outcome, result.progress.succeeded) == (Outcome.SUCCEEDED, DEVICES), result
    assert adds_up(view.progress)
    assert sorted(f.device_id for f in failed) == sorted(f"{name}-{i}" for i in range(10, DEVICES + 1, 10))
    assert set(Counter((worked.device, worked.attempt) for worked in log).values()) == {1}, "no attempt was made twice"
    assert len(log) == DEVICES + DEVICES // 10
    assert most_at_once(log) <= CAP
