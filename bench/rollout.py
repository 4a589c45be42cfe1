"""One measured rollout: a fresh stack, a fleet in the registry, a signed release, simulated devices, three waves.

The clock runs from just before the workflow is started to its result: planning, deltas, every wave, closing. A second,
small rollout of a bad release crosses the gate's boundary, so that "admitted after crossing" is a measurement.
"""

import asyncio
import hashlib
import itertools
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import psycopg
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from temporalio.client import Client

from activities.artifact_store import ArtifactStore
from bench.sampling import Sampler
from cli.publish import publish_image
from devstack.broker import BrokerKind
from devstack.stack import EmbeddedStack
from domain.device_rows import Format
from firmware.keys import generate_private_key, save_public_key
from models.errors import UnavailableError
from models.ids import rollout_workflow_id, wave_workflow_id
from models.rollout import RolloutResult, StartRolloutInput
from models.settings import Settings
from models.spec import RolloutSpec
from store.engine import Database
from store.executions import COUNT_NAMES
from store.registry import Registry
from workflows.client import connect, start_rollout

PRODUCT, VERSION, BAD_VERSION, BASE_VERSION = "bench", "2.0.0", "3.0.0-bad", "1.0.0"
IMAGE_BYTES = 64 * 1024
IN_FLIGHT = 1000
WAVES = (("canary", "5%"), ("early", "25%"), ("fleet", "100%"))
READY_SECONDS = 180
LONGEST_SECONDS = 900
CROSSING_DEVICES = 500
CROSSING_IN_FLIGHT = 50
"""The rollout that crosses: one wave, few devices at a time, so that there is always a next one to be admitted when the
breaker trips, and long before the last of them."""
BAD_SHARE = "crash=30%"
PIECES = {"postgres": "postgresql"}
"""Names in the figures where they differ from the stack's."""
MEASURED = ("gateway", "worker", "postgresql", "temporal", "broker", "simulator")


@dataclass(frozen=True)
class BenchConfig:
    """What to run. `broker` None: Mosquitto where it is installed. `connections` None: one per device."""

    devices: int
    failures: str = "fail=1%,crash=1%"
    seed: int = 1
    broker: BrokerKind | None = None
    connections: int | None = None
    in_flight: int = IN_FLIGHT


@dataclass
class Bench:
    """One run on one stack."""

    config: BenchConfig
    folder: Path
    stack: EmbeddedStack
    db: Database
    client: Client
    release_key: Ed25519PrivateKey = field(default_factory=generate_private_key)
    images: dict[str, bytes] = field(default_factory=dict)

    async def run(self) -> dict[str, Any]:
        """Both rollouts; the figures by their names."""
        await self._publish()
        empty = self._database_bytes()
        await self._import("bench", self.config.devices)
        async with self._fleet("bench", self.config.failures) as simulator:
            sampler = Sampler(lambda: self._pids(simulator))
            async with sampler:
                started = time.time()
                result = await self._roll(self._spec("bench", VERSION, WAVES, self.config.in_flight))
                ended = time.time()
        figures = self._costs(sampler, result) | await self._facts(result, (started, ended), empty)
        figures["devices_disagreeing"] = self._disagreeing("bench", result)
        await self._import("crossing", CROSSING_DEVICES)
        async with self._fleet("crossing", f"version={BAD_VERSION},{BAD_SHARE}"):
            crossing = await self._roll(self._spec("crossing", BAD_VERSION, WAVES[-1:], CROSSING_IN_FLIGHT))
        return figures | self._crossing(crossing)

    # --- preparing ---------------------------------------------------------------------------------------------------

    async def _publish(self) -> None:
        """The image in the field, and two that differ from it in places, so that deltas are made."""
        save_public_key(self.folder / "release.pub", self.release_key.public_key())
        source = random.Random(self.config.seed)
        base = source.randbytes(IMAGE_BYTES)
        self.images = {BASE_VERSION: base}
        for version in (VERSION, BAD_VERSION):
            self.images[version] = source.randbytes(IMAGE_BYTES // 8) + base[IMAGE_BYTES // 8 :]
        store = ArtifactStore.open(str(self.stack.endpoints.artifact_store))
        for version, image in self.images.items():
            await publish_image(
                self.db,
                store,
                self.release_key,
                image,
                product=PRODUCT,
                version=version,
                hardware=("bench", "crossing"),
            )

    async def _import(self, kind: str, count: int) -> None:
        sha256 = _sha256(self.images[BASE_VERSION])
        lines = [
            orjson.dumps(
                {
                    "device_id": f"{kind}-{number:06d}",
                    "device_type": kind,
                    "serial_number": f"{kind}-SN-{number:06d}",
                    "site_id": f"site-{number % 20}",
                    "tags": {"environment": "production"},
                    "firmware_version": BASE_VERSION,
                    "firmware_sha256": sha256,
                }
            )
            for number in range(count)
        ]
        self._devices_file(kind).write_bytes(b"\n".join(lines) + b"\n")
        await Registry(self.db).import_devices(lines, f"{kind}.jsonl", Format.JSON_LINES)

    def _devices_file(self, kind: str) -> Path:
        return self.folder / f"{kind}.jsonl"

    @asynccontextmanager
    async def _fleet(self, kind: str, faults: str) -> AsyncIterator[subprocess.Popen[bytes]]:
        """The simulator as a process of its own, connected and waiting for hints."""
        ready, endpoints = self.folder / f"{kind}-ready", self.stack.endpoints
        command = [sys.executable, "-m", "agent.fleet", "--simulate", "--no-ask"]
        command += ["--devices-file", str(self._devices_file(kind)), "--product", PRODUCT]
        command += ["--base-version", BASE_VERSION, "--base-sha256", _sha256(self.images[BASE_VERSION])]
        command += ["--release-key", str(self.folder / "release.pub")]
        command += ["--order-key", str(Path(str(endpoints.order_key)).with_suffix(".pub"))]
        command += ["--mqtt", str(endpoints.open_mqtt_url)]
        command += ["--seed", str(self.config.seed), "--fault", faults]
        command += ["--ready-file", str(ready), "--report", str(self._report_file(kind))]
        if self.config.connections is not None:
            command += ["--connections", str(self.config.connections)]
        log = self.stack.state.log("simulator")
        with log.open("ab") as output:
            process = await asyncio.to_thread(subprocess.Popen, command, stdout=output, stderr=output)
        try:
            await _until_ready(process, ready, log)
            yield process
        finally:
            process.terminate()
            await asyncio.to_thread(process.wait, 60)

    def _report_file(self, kind: str) -> Path:
        return self.folder / f"{kind}-report.json"

    def _spec(self, kind: str, version: str, waves: tuple[tuple[str, str], ...], in_flight: int) -> RolloutSpec:
        return RolloutSpec.model_validate(
            {
                "name": kind,
                "release": f"{PRODUCT}@{version}",
                "target": {"type": kind},
                "waves": [{"name": name, "size": size} for name, size in waves],
                "pace": {"in_flight": in_flight, "per_minute": None},
            }
        )

    # --- running -----------------------------------------------------------------------------------------------------

    async def _roll(self, spec: RolloutSpec) -> RolloutResult:
        handle = await start_rollout(self.client, StartRolloutInput(spec=spec, requested_by="bench"))
        try:
            return await asyncio.wait_for(handle.result(), LONGEST_SECONDS)
        except TimeoutError as error:
            raise UnavailableError(
                f"the rollout {spec.name} did not end within {LONGEST_SECONDS} s: "
                f"{self._rows('SELECT wave, status, queued, in_progress, succeeded, failed FROM waves ORDER BY job_no, wave')}"
            ) from error

    def _pids(self, simulator: subprocess.Popen[bytes]) -> dict[str, list[int]]:
        pids = {PIECES.get(name, name): found for name, found in self.stack.pids().items()}
        return {name: found for name, found in (pids | {"simulator": [simulator.pid]}).items() if name in MEASURED}

    # --- figures -----------------------------------------------------------------------------------------------------

    def _costs(self, sampler: Sampler, result: RolloutResult) -> dict[str, Any]:
        """Per device that has answered: a rollout that was halted must not look fast."""
        devices = max(1, result.succeeded + result.failed)
        return {
            "devices_per_second": devices / sampler.seconds,
            "cpu_seconds_per_1000": {name: 1000 * sampler.cpu[name] / devices for name in MEASURED},
            "peak_memory_mib": {name: sampler.peak_mib[name] for name in MEASURED},
            "seconds": sampler.seconds,
            "others_share_of_machine": sampler.others_share,
        }

    async def _facts(self, result: RolloutResult, clock: tuple[float, float], empty: int) -> dict[str, Any]:
        job_no = self._job_no("bench")
        waves = self._rows(
            "SELECT wave, name, target_count, extract(epoch FROM opened_at)::float8, extract(epoch FROM answered_at)::float8, "
            "extract(epoch FROM closed_at)::float8 FROM waves WHERE job_no = %s ORDER BY wave",
            job_no,
        )
        gaps = [after[3] - before[4] for before, after in itertools.pairwise(waves) if after[3] and before[4]]
        return {
            "history_events": await self._history_events(result),
            "database_bytes_per_device": (self._database_bytes() - empty) / self.config.devices,
            "gate_to_next_wave_seconds": max(gaps, default=None),
            "counted_minus_true": self._miscount(job_no),
            "outcome": str(result.outcome),
            "reason": result.reason,
            "succeeded": result.succeeded,
            "failed": result.failed,
            "by_delta": result.by_delta,
            "timeline_seconds": _timeline(waves, *clock),
        }

    def _crossing(self, result: RolloutResult) -> dict[str, Any]:
        """Executions that started after the moment a wave's breaker tripped, in the rollout of the bad release."""
        job_no = self._job_no("crossing")
        after = self._rows(
            "SELECT count(*) FROM executions e JOIN waves w ON w.job_no = e.job_no "
            "WHERE e.job_no = %s AND w.tripped_at IS NOT NULL AND e.started_at > w.tripped_at",
            job_no,
        )
        tripped = self._rows(
            "SELECT wave, tripped_failed, tripped_exposed FROM waves WHERE job_no = %s AND tripped_at IS NOT NULL",
            job_no,
        )
        return {
            "admitted_after_crossing": after[0][0] if tripped else None,
            "crossing": {
                "outcome": str(result.outcome),
                "reason": result.reason,
                "devices": result.devices,
                "exposed": result.exposed,
                "tripped": [dict(zip(("wave", "failed", "exposed"), row, strict=True)) for row in tripped],
                "counted_minus_true": self._miscount(job_no),
            },
        }

    def _miscount(self, job_no: int) -> int:
        """Sum over waves and states of |counter - recount|."""
        differences = " + ".join(
            f"abs(w.{state} - (SELECT count(*) FROM executions e WHERE e.job_no = w.job_no AND e.wave = w.wave "
            f"AND e.state = '{state.upper()}'))"
            for state in COUNT_NAMES
        )
        return int(self._rows(f"SELECT coalesce(sum({differences}), 0) FROM waves w WHERE w.job_no = %s", job_no)[0][0])

    def _disagreeing(self, kind: str, result: RolloutResult) -> int:
        """Devices for which the simulator and PostgreSQL differ on what runs now."""
        report = orjson.loads(self._report_file(kind).read_bytes())
        device_side = {device["device_id"]: device["sha256"] for device in report["devices"]}
        registry = dict(self._rows("SELECT device_id, firmware_sha256 FROM devices WHERE device_type = %s", kind))
        return sum(registry[device_id] != sha256 for device_id, sha256 in device_side.items())

    async def _history_events(self, result: RolloutResult) -> int:
        """Events of the rollout's workflow and of its waves' together."""
        ids = [rollout_workflow_id(result.name)]
        ids += [wave_workflow_id(result.name, wave.wave) for wave in result.waves if wave.opened_at]
        described = [await self.client.get_workflow_handle(workflow_id).describe() for workflow_id in ids]
        return sum(description.history_length for description in described)

    def _job_no(self, name: str) -> int:
        return int(self._rows("SELECT job_no FROM jobs WHERE name = %s", name)[0][0])

    def _database_bytes(self) -> int:
        return int(self._rows("SELECT pg_database_size(current_database())")[0][0])

    def _rows(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.db.url) as connection:
            return connection.execute(statement.encode(), parameters).fetchall()


async def run(config: BenchConfig) -> dict[str, Any]:
    """A stack in a temporary folder, both rollouts on it, and everything taken down, also after SIGTERM."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as name:
        folder = Path(name)
        async with EmbeddedStack(folder / "state", settings=Settings(), broker=config.broker, open_mqtt=True) as stack:
            db = Database(str(stack.endpoints.database_url))
            await db.open()
            client = await connect(str(stack.endpoints.temporal_address), stack.settings.temporal_namespace)
            try:
                figures = await Bench(config, folder, stack, db, client).run()
            finally:
                await db.close()
            broker = stack.broker_kind
    return {"devices": config.devices, "broker": broker, "seed": config.seed} | figures


def _timeline(waves: list[tuple[Any, ...]], started: float, ended: float) -> dict[str, float]:
    """Where the time went: to the first wave's opening, in each wave until it answered, and until the result."""
    found = {}
    last = started
    for _, name, _, opened, answered, _ in waves:
        if opened and answered:
            found[f"before {name}"] = opened - last
            found[name] = answered - opened
            last = answered
    found["after the last answer"] = ended - last
    return found


async def _until_ready(process: subprocess.Popen[bytes], ready: Path, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not await asyncio.to_thread(ready.exists):
        if process.poll() is not None or time.monotonic() > deadline:
            said = await asyncio.to_thread(log.read_text)
            raise UnavailableError(
                f"the simulator did not connect its devices within {READY_SECONDS} s "
                f"(exit status {process.poll()}): {said[-1500:]}"
            )
        await asyncio.sleep(0.1)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
