"""`kill -9` of the worker before and after every activity of every lifecycle workflow: it ends as if nothing had been.

For each kind of workflow a device goes through it undisturbed; from its history come the activities there are. Then one
device goes through it for each of them and each of two points: the worker dies before the activity has done anything,
or when it has done everything and nobody has been told. What is left of that device in PostgreSQL has to be what is
left of the undisturbed one: certificates, status, enrolment, configurations, commands, tombstone, shadow, and every line
of the audit, in the same order, each once.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from temporalio.client import Client, WorkflowHandle
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.testing import WorkflowEnvironment

from models.identity import (
    ClaimBatchSpec,
    ConfigureDeviceInput,
    DecommissionDeviceInput,
    DeviceHappening,
    ProvisionDeviceInput,
    ReissueCertificateInput,
    RotateCertificateInput,
)
from models.ids import reissue_workflow_id, shadow_workflow_id
from models.protocol import CommandStatus
from models.shadow import SyncShadowInput
from pki.keys import spki_sha256
from store.access import share_access
from store.claims import ClaimStore
from store.commands import CommandAnswer, answer_commands, pending_commands
from store.configurations import report
from store.engine import Database
from store.enrolments import EnrolmentRequest, EnrolmentStore
from store.peers import PeerStore
from store.shadows import load_shadows, save_shadows
from store.waits import happened
from tests.chaos.dying_worker import PLAN, death
from tests.conftest import Broker, free_port
from tests.identity_setup import make_authorities
from tests.temporal_server import BINARIES
from workflows.client import connect, register_search_attributes, start_provisioning, start_reissue
from workflows.lifecycle_client import start_configuration, start_decommission, start_rotation
from workflows.shadow_client import start_shadow_sync, sync_token

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parent.parent.parent
KINDS = ("provision", "configure", "rotate", "reissue", "decommission", "shadow")
GOOD = "undisturbed"
CLAIM = "c" * 64
NEXT_DEATH_SECONDS = 120.0
WANTED = {"power": "on"}


@dataclass
class World:
    """Servers, a worker that is started again whenever it has died, and a player for every device."""

    db: Database
    client: Client
    deaths: Path
    environment: dict[str, str]
    log: Path
    died: int = 0
    handles: dict[tuple[str, str], WorkflowHandle[Any, Any]] = field(default_factory=dict)
    keys: dict[str, ec.EllipticCurvePrivateKey] = field(default_factory=dict)
    """By device: the key of its next certificate."""
    _process: subprocess.Popen[bytes] | None = None

    # --- the worker ----------------------------------------------------------------------------------------------------

    async def keep_worker(self) -> None:
        """Start a worker, and another one when it has died."""
        while True:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(  # noqa: ASYNC220
                    [sys.executable, "-m", "tests.chaos.dying_worker"],
                    cwd=ROOT,
                    env=os.environ | self.environment,
                    stdout=log,
                    stderr=log,
                )
            while self._process.poll() is None:
                await asyncio.sleep(0.05)
            assert self._process.returncode == -signal.SIGKILL, self.log.read_text()[-3000:]
            self.died += 1

    def end_worker(self) -> None:
        """End it for good."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(10)

    # --- the devices ---------------------------------------------------------------------------------------------------

    async def play(self) -> None:
        """Do what workflows wait for, as the gateway and the enrolment server record it."""
        while True:
            async with self.db.pool.connection() as connection:
                rows = await (
                    await connection.execute("SELECT device_id, event, at_least FROM device_waits")
                ).fetchall()
            for device_id, event, at_least in rows:
                await self._do(device_id, DeviceHappening(event), at_least)
            await asyncio.sleep(0.05)

    async def _do(self, device_id: str, wanted: DeviceHappening, at_least: int | None) -> None:
        async with self.db.pool.connection() as connection:
            await share_access(connection)
            match wanted:
                case DeviceHappening.CONNECTED | DeviceHappening.HEARTBEAT:
                    await happened(connection, [(device_id, wanted, {})])
                case DeviceHappening.CONFIGURED:
                    await report(connection, device_id, at_least or 1)
                case DeviceHappening.SHADOW_REPORTED:
                    shadows = await load_shadows(connection, [(device_id, "")])
                    shadows[device_id, ""].update({"reported": WANTED}, 1.0, f"device:{device_id}")
                    await save_shadows(connection, shadows.values(), 1.0)
                case DeviceHappening.COMMAND_ANSWERED:
                    pending = (await pending_commands(connection, [device_id])).get(device_id)
                    if pending is not None:
                        answer = CommandAnswer(device_id, pending.request_id, CommandStatus.SUCCEEDED)
                        await answer_commands(connection, [answer])
        if wanted is DeviceHappening.CERTIFICATE_CONFIRMED:
            newest = (await self._certificates(device_id))[-1]
            await PeerStore(self.db).confirm(newest, device_id)
        if wanted is DeviceHappening.CERTIFICATE_ISSUED:
            await self._come_for_a_new_one(device_id)

    async def _certificates(self, device_id: str) -> list[str]:
        """The ids of its valid certificates, the oldest first."""
        async with self.db.pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT certificate_id FROM certificates WHERE device_id = %s AND state = 'valid' ORDER BY generation",
                (device_id,),
            )
            return [row[0] for row in await cursor.fetchall()]

    async def _come_for_a_new_one(self, device_id: str) -> WorkflowHandle[Any, Any]:
        """Ask for the next certificate as the enrolment server does; whether it comes now or later."""
        public, spki = _public(self.keys.setdefault(device_id, ec.generate_private_key(ec.SECP256R1())))
        valid = await self._certificates(device_id)
        asked = ReissueCertificateInput(device_id=device_id, certificate_id=valid[0], public_key=public)
        return await start_reissue(self.client, asked, spki)

    # --- the workflows -------------------------------------------------------------------------------------------------

    async def begin(self, kind: str, name: str) -> None:
        """Start a workflow of this kind over a device of its own."""
        device = f"{kind}-{name}"
        match kind:
            case "provision":
                handle: WorkflowHandle[Any, Any] = await self._enrol(device)
            case "reissue":
                handle = await self._come_for_a_new_one(device)
            case "configure":
                asked = ConfigureDeviceInput(device_id=device, config={"updateInterval": 5000}, actor="alice")
                handle = await start_configuration(self.client, asked)
            case "shadow":
                handle = await start_shadow_sync(self.client, _wanting(device))
            case "rotate":
                handle = await start_rotation(self.client, RotateCertificateInput(device_id=device, actor="alice"))
            case _:
                leave = DecommissionDeviceInput(device_id=device, actor="alice", reason="sold")
                handle = await start_decommission(self.client, leave)
        assert handle.id == self.workflow_id(kind, name)
        self.handles[kind, name] = handle

    def workflow_id(self, kind: str, name: str) -> str:
        """The id that `begin` will give it."""
        device = f"{kind}-{name}"
        if kind == "reissue":
            key = self.keys.setdefault(device, ec.generate_private_key(ec.SECP256R1()))
            return reissue_workflow_id(device, _public(key)[1])
        if kind == "shadow":
            return shadow_workflow_id(device, "", sync_token(_wanting(device)))
        return f"{kind}:{device}"

    async def make_device(self, device: str) -> None:
        """A device that has been provisioned."""
        await (await self._enrol(device)).result()

    async def _enrol(self, serial: str) -> WorkflowHandle[Any, Any]:
        public, spki = _public(ec.generate_private_key(ec.SECP256R1()))
        answer = await EnrolmentStore(self.db).request(CLAIM, EnrolmentRequest(serial, spki, public), None)
        assert answer.enrolment_no is not None, answer.reason
        return await start_provisioning(
            self.client, ProvisionDeviceInput(enrolment_no=answer.enrolment_no, serial_number=serial)
        )

    async def activities(self, handle: WorkflowHandle[Any, Any]) -> list[str]:
        """The activities in a workflow's history, each by its type and which of that type it is."""
        history = await handle.fetch_history()
        kinds = [
            event.activity_task_scheduled_event_attributes.activity_type.name
            for event in history.events
            if event.HasField("activity_task_scheduled_event_attributes")
        ]
        return [f"{kind}-{kinds[: at + 1].count(kind)}" for at, kind in enumerate(kinds)]

    async def left(self, device: str) -> dict[str, Any]:
        """What PostgreSQL holds of a device, without ids and times."""
        asked = {
            "device": "SELECT status, barred_at IS NOT NULL, retired_at IS NOT NULL, config_version, "
            "desired_config_version, desired_config FROM devices WHERE device_id = %(device)s",
            "certificates": "SELECT generation, state, revocation_reason, confirmed_at IS NOT NULL "
            "FROM certificates WHERE device_id = %(device)s ORDER BY generation",
            "enrolments": "SELECT state, counted FROM enrolments WHERE serial_number = %(device)s ORDER BY enrolment_no",
            "configurations": "SELECT version, actor, acknowledged_at IS NOT NULL FROM device_configurations "
            "WHERE device_id = %(device)s ORDER BY version",
            "commands": "SELECT operation, state FROM device_commands WHERE device_id = %(device)s ORDER BY created_at",
            "tombstones": "SELECT released_at FROM tombstones WHERE serial_number = %(device)s",
            "audit": "SELECT actor, action FROM audit_events WHERE subject = %(device)s ORDER BY event_no",
            "shadows": "SELECT version, desired, reported, deleted_at FROM shadows WHERE device_id = %(device)s",
            "shadow_history": "SELECT version, actor, change FROM shadow_history WHERE device_id = %(device)s "
            "ORDER BY version",
            "waits": "SELECT event FROM device_waits WHERE device_id = %(device)s",
            "alerts": "SELECT rule FROM alerts WHERE subject = %(device)s",
        }
        async with self.db.pool.connection() as connection:
            return {
                what: [
                    tuple(row) for row in await (await connection.execute(sql.encode(), {"device": device})).fetchall()
                ]
                for what, sql in asked.items()
            }


def _wanting(device: str) -> SyncShadowInput:
    return SyncShadowInput(device_id=device, patch=WANTED, actor="alice", limit=timedelta(minutes=10))


async def pending(handle: WorkflowHandle[Any, Any]) -> str:
    """What a workflow waits for, for the message of a failure."""
    return str((await handle.describe()).raw_description.pending_activities)


def _public(key: ec.EllipticCurvePrivateKey) -> tuple[str, str]:
    public = key.public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    return pem, spki_sha256(public)


@pytest_asyncio.fixture
async def world(db: Database, database_url: str, broker: Broker, tmp_path: Path) -> AsyncIterator[World]:
    """Everything running, and a batch to enrol with."""
    folder, passphrase = await make_authorities(db, tmp_path)
    async with await WorkflowEnvironment.start_local(
        data_converter=pydantic_data_converter,
        port=free_port(),
        dev_server_existing_path=str(BINARIES / "temporal"),
        dev_server_log_level="error",
    ) as environment:
        address = environment.client.service_client.config.target_host
        spec = ClaimBatchSpec(
            name="chaos",
            device_type="motor",
            site_id="berlin",
            config={"updateInterval": 60},
            max_devices=1000,
            expires_at=datetime.now(UTC) + timedelta(days=30),
        )
        await ClaimStore(db).create(spec, [], "-", CLAIM, "alice")
        client = await connect(address)
        await register_search_attributes(client)
        deaths = tmp_path / "deaths"
        deaths.mkdir()
        made = World(
            db,
            client,
            deaths,
            {
                PLAN: str(deaths),
                "TIDEGATE_STATE_DIR": str(tmp_path),
                "TIDEGATE_TEMPORAL_ADDRESS": address,
                "TIDEGATE_DATABASE_URL": database_url,
                "TIDEGATE_MQTT_URL": f"mqtt://{broker.host}:{broker.port}",
                "TIDEGATE_ARTIFACT_STORE": tmp_path.as_uri(),
                "TIDEGATE_CA_DIR": str(folder),
                "TIDEGATE_CA_PASSPHRASE_FILE": str(passphrase),
            },
            tmp_path / "worker.log",
        )
        tasks = [asyncio.create_task(made.keep_worker()), asyncio.create_task(made.play())]
        try:
            yield made
        finally:
            for task in tasks:
                task.cancel()
            made.end_worker()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_worker_that_dies_around_any_activity_of_a_lifecycle_leaves_no_trace(world: World) -> None:
    names: dict[str, list[str]] = {}
    for kind in KINDS:
        if kind != "provision":
            await world.make_device(f"{kind}-{GOOD}")
        await world.begin(kind, GOOD)
        await asyncio.wait_for(world.handles[kind, GOOD].result(), 60)
        found = await world.activities(world.handles[kind, GOOD])
        assert found, f"{kind} has {found}"
        names[kind] = [f"{which}-{point}" for which in found for point in ("before", "after")]
    assert world.died == 0

    for kind in KINDS:
        if kind != "provision":
            await asyncio.gather(*(world.make_device(f"{kind}-{name}") for name in names[kind]))
    planned = 0
    for kind in KINDS:
        for name in names[kind]:
            workflow_id = world.workflow_id(kind, name)
            number, point = name.rsplit("-", 1)
            (world.deaths / death(workflow_id, number, point)).touch()
            planned += 1
    await asyncio.gather(*(world.begin(kind, name) for kind in KINDS for name in names[kind]))
    results: dict[tuple[str, str], Any] = {}
    for key, handle in world.handles.items():
        try:
            results[key] = await asyncio.wait_for(handle.result(), NEXT_DEATH_SECONDS)
        except TimeoutError:
            left = sorted(path.name for path in world.deaths.iterdir())
            pytest.fail(f"{key} hangs after {world.died} of {planned} deaths, left {left}: {await pending(handle)}")
    # How often a device is reminded depends on when it acts, so a workflow may have had fewer of one activity.
    for kind in KINDS:
        for name in names[kind]:
            which, point = name.rsplit("-", 1)
            had = which in await world.activities(world.handles[kind, name])
            survived = (world.deaths / death(world.workflow_id(kind, name), which, point)).exists()
            assert had is not survived, f"{kind}: the death {name} did not come"
            planned -= survived
    assert world.died == planned

    for kind in KINDS:
        good = await world.left(f"{kind}-{GOOD}")
        for name in names[kind]:
            left = await world.left(f"{kind}-{name}")
            for what, rows in left.items():
                rows = [tuple(str(cell).replace(name, GOOD) for cell in row) for row in rows]
                expected = [tuple(map(str, row)) for row in good[what]]
                assert rows == expected, f"{kind}: {what} differs after a worker died {name}"
            outcome = getattr(results[kind, name], "outcome", None)
            assert outcome == getattr(results[kind, GOOD], "outcome", None)
    print(f"{planned} deaths: { ({kind: len(found) // 2 for kind, found in names.items()}) } activities")
