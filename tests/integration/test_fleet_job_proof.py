"""A job over 2,000 devices that do as they please: attempts, backoff, counts and parallelism are exact.

Real broker, real gateway process, PostgreSQL and Temporal. Every tenth device fails twice and then succeeds. The gateway
is killed twice with SIGKILL on the way, with requests in its hands. What is claimed is looked at from two sides: rows of
PostgreSQL, sampled while it runs, and what the devices themselves have logged.
"""

import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from temporalio.client import Client

from activities.fleet_jobs import FleetJobActivities
from activities.rollouts import RolloutActivities
from firmware.keys import TrustedKeys, generate_private_key, save_private_key
from models.fleetjob import FleetJobProgress, FleetJobResult, StartFleetJobInput
from models.protocol import ExecutionState
from models.rollout import JobStatus, Outcome
from models.settings import Settings
from store.engine import Database
from store.fleetjobs import FleetJobStore
from store.rollouts import RolloutStore
from tests.conftest import Broker
from tests.integration.job_devices import JobDevice, Worked, most_at_once
from tests.integration.jobs_setup import adds_up, job, miscounted
from tests.integration.rollout_setup import add_devices
from tests.workflow.conftest import workers
from transport.publisher import Publisher
from workflows.fleet_jobs_client import start_fleet_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DEVICES, EVERY, CAP, BACKOFF_SECONDS = 2000, 10, 60, 1.0
ALLOWED_SECONDS = 200.0
"""Of a loaded machine; a quiet one takes a fifth of it."""


@dataclass
class GatewayProcess:
    """A real one, that can be killed."""

    db: Database
    broker: Broker
    folder: Path
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        env = {
            **os.environ,
            "TIDEGATE_STATE_DIR": str(self.folder),
            "TIDEGATE_DATABASE_URL": self.db.url,
            "TIDEGATE_MQTT_URL": f"mqtt://{self.broker.host}:{self.broker.port}",
            "TIDEGATE_ARTIFACT_URL": "http://127.0.0.1:1/",
            "TIDEGATE_ORDER_KEY": str(self.folder / "order.key"),
        }
        with (self.folder / "gateway.log").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "gateway"], env=env, stdout=log, stderr=log)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@dataclass
class Samples:
    """What PostgreSQL showed while the job ran."""

    figures: list[FleetJobProgress] = field(default_factory=list)
    most_in_progress: int = 0
    most_in_flight: int = 0

    async def take(self, db: Database, name: str) -> FleetJobProgress | None:
        """One look: the figures, and a count of the rows themselves."""
        async with db.pool.connection() as connection:
            row = await (
                await connection.execute(
                    "SELECT j.job_no, j.in_flight, (SELECT count(*) FROM executions e WHERE e.job_no = j.job_no "
                    "AND e.state = 'IN_PROGRESS') FROM jobs j WHERE j.name = %s",
                    (name,),
                )
            ).fetchone()
        if row is None:
            return None
        self.most_in_flight = max(self.most_in_flight, row[1])
        self.most_in_progress = max(self.most_in_progress, row[2])
        self.figures.append(await FleetJobStore(db).figures(row[0]))
        return self.figures[-1]


@asynccontextmanager
async def engine(db: Database, temporal: Client, broker: Broker) -> AsyncIterator[None]:
    """Workers with the real activities, whose hints go over the broker."""
    publisher = await Publisher.connect(Settings(mqtt_url=f"mqtt://{broker.host}:{broker.port}", database_url=db.url))
    rollouts, jobs = RolloutActivities(RolloutStore(db), publisher), FleetJobActivities(FleetJobStore(db))
    activities: list[Any] = [
        jobs.plan_fleet_job,
        rollouts.drive_wave,
        rollouts.set_job_status,
        rollouts.finish_rollout,
        rollouts.cancel_running,
    ]
    async with workers(temporal, activities):
        yield
    await publisher.close()


@asynccontextmanager
async def fleet(broker: Broker, trusted: TrustedKeys, log: list[Worked]) -> AsyncIterator[list[JobDevice]]:
    """Two thousand devices, connected; every tenth fails in its first two attempts."""

    def fate(number: int) -> Any:
        return (lambda attempt: attempt < 3) if number % EVERY == 0 else (lambda _attempt: False)

    devices = [JobDevice(f"motor-{i}", trusted, fate(i), log) for i in range(1, DEVICES + 1)]
    for start in range(0, DEVICES, 200):
        await asyncio.gather(*(device.connect(broker.host, broker.port) for device in devices[start : start + 200]))
    yield devices
    for device in devices:
        device.close()
    await asyncio.sleep(0)


async def watch(db: Database, name: str, gateway: GatewayProcess, samples: Samples, kills: list[int]) -> None:
    """Sample until cancelled; kill the gateway whenever so many devices have succeeded, and start another."""
    while True:
        seen = await samples.take(db, name)
        if seen is not None and kills and seen.succeeded >= kills[0]:
            kills.pop(0)
            gateway.kill()
            gateway.start()
        await asyncio.sleep(0.1)


async def test_two_thousand_devices_of_which_every_tenth_fails_twice_before_it_succeeds(
    db: Database, temporal: Client, broker: Broker, tmp_path: Path
) -> None:
    order_key = generate_private_key()
    save_private_key(tmp_path / "order.key", order_key)
    trusted = TrustedKeys.of(release=[generate_private_key().public_key()], order=[order_key.public_key()])
    await add_devices(db, DEVICES)
    gateway, samples, log, kills = GatewayProcess(db, broker, tmp_path), Samples(), [], [400, 1100]
    gateway.start()
    spec = job(
        f"proof-{os.getpid()}",
        "custom",
        document={"blink": 3},
        max_parallel=CAP,
        retry={"max_attempts": 3, "backoff": f"{BACKOFF_SECONDS}s", "backoff_multiplier": 2},
    )
    started = time.monotonic()
    async with fleet(broker, trusted, log), engine(db, temporal, broker):
        watching = asyncio.create_task(watch(db, spec.name, gateway, samples, kills))
        handle = await start_fleet_job(temporal, StartFleetJobInput(spec=spec, requested_by="alice"))
        ending = asyncio.create_task(handle.result())
        try:
            await asyncio.wait({ending, watching}, timeout=ALLOWED_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                if watching.done():
                    await watching
                pytest.fail(f"not over: {samples.figures[-1:]}\n{(tmp_path / 'gateway.log').read_text()[-2000:]}")
            result = await ending
        finally:
            for task in (watching, ending):
                task.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            gateway.kill()
    print(f"{DEVICES} devices, {len(log)} attempts, {time.monotonic() - started:.1f} s, {len(samples.figures)} samples")
    assert kills == [], "the gateway has been killed twice"
    check_result(result)
    check_samples(samples)
    check_devices(log)
    await check_rows(db, spec.name)


def check_result(result: FleetJobResult) -> None:
    failing = DEVICES // EVERY
    assert result.outcome is Outcome.SUCCEEDED, result.reason
    assert result.progress == FleetJobProgress(total=DEVICES, succeeded=DEVICES, attempts_failed=2 * failing)


def check_samples(samples: Samples) -> None:
    assert len(samples.figures) > 20
    assert all(adds_up(figures) and figures.total == DEVICES for figures in samples.figures)
    assert samples.most_in_flight <= CAP and samples.most_in_progress <= CAP
    assert any(figures.retrying for figures in samples.figures)
    succeeded = [figures.succeeded for figures in samples.figures]
    assert succeeded == sorted(succeeded)


def check_devices(log: list[Worked]) -> None:
    attempts = Counter(worked.device for worked in log)
    assert set(attempts.values()) == {1, 3}
    for number in range(1, DEVICES + 1):
        mine = [worked for worked in log if worked.device == f"motor-{number}"]
        assert [worked.attempt for worked in mine] == ([1, 2, 3] if number % EVERY == 0 else [1])
        for before, after in itertools.pairwise(mine):
            assert after.began - before.ended >= BACKOFF_SECONDS * 2 ** (before.attempt - 1)
    assert most_at_once(log) <= CAP


async def check_rows(db: Database, name: str) -> None:
    store, failing = FleetJobStore(db), DEVICES // EVERY
    view = await store.get(name)
    assert (view.status, view.outcome) == (JobStatus.FINISHED, Outcome.SUCCEEDED)
    assert await miscounted(db, view.job_no) == []
    failures = await store.failures(name, limit=10 * DEVICES)
    assert Counter(failure.attempt for failure in failures) == {1: failing, 2: failing}
    assert {failure.device_id for failure in failures} == {f"motor-{i}" for i in range(EVERY, DEVICES + 1, EVERY)}
    ends = {e.device_id: e for e in await store.executions(name, ExecutionState.SUCCEEDED, limit=DEVICES)}
    assert len(ends) == DEVICES
    second = {failure.device_id: failure for failure in failures if failure.attempt == 2}
    for failure in failures:
        pause = BACKOFF_SECONDS * 2 ** (failure.attempt - 1)
        assert failure.retry_at is not None
        assert (failure.retry_at - failure.failed_at).total_seconds() == pytest.approx(pause, abs=1e-4)
        began = second[failure.device_id].started_at if failure.attempt == 1 else ends[failure.device_id].started_at
        assert began is not None and began >= failure.retry_at
        assert ends[failure.device_id].execution_number == 3
    async with db.pool.connection() as connection:
        row = await (await connection.execute("SELECT exposed FROM jobs WHERE job_no = %s", (view.job_no,))).fetchone()
    assert row is not None and row[0] == DEVICES + 2 * failing, "every attempt was admitted once"
