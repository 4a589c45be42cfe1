"""A fleet of real devices in one process: slots on disk, downloads, deltas, an aiomqtt session each.

A reboot ends everything of a device but its folder; the boot loader model decides what comes up again.
"""

import asyncio
import hashlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import orjson

from agent.bootloader import Boot
from agent.commands import Enrolled
from agent.credentials import Credentials
from agent.device import Device, DeviceConfig
from agent.download import DownloadPolicy
from agent.enrolment import enrol_for_good
from agent.errors import BrickedError, CredentialError, TaskError, WipedError
from agent.faults import Fate, FaultPlan, chance
from agent.fleet_config import DeviceReport, FleetConfig, FleetDevice
from agent.image import Behaviour, behaviour_of
from agent.slots import Slots
from agent.state import StateStore
from agent.storage import PosixStorage
from agent.tasks import Custom, TaskStore
from agent.trust import Trust
from agent.updater import Identity
from firmware.task import Task
from models.protocol import FailureClass


class FaultyStorage(PosixStorage):
    """A device's folder in which an update that is fated to fail cannot be written into a slot."""

    def __init__(self, root: Path, device_id: str, faults: FaultPlan) -> None:
        super().__init__(root)
        self._device_id = device_id
        self._faults = faults

    def write(self, name: str, data: bytes) -> None:
        if name.startswith("slots/"):
            update = StateStore(self).state.update
            if update is not None and self._faults.fate(self._device_id, update.version) is Fate.FAIL:
                raise OSError(5, f"{name} cannot be written (simulated fault)")
        super().write(name, data)


_BEHAVIOUR = {
    Fate.CRASH: Behaviour.CRASH,
    Fate.NO_CONFIRM: Behaviour.NO_NETWORK,
    Fate.SILENT: Behaviour.SILENT,
}


class RealFleet:
    """Devices of agent.device, with their slots on disk."""

    def __init__(self, config: FleetConfig) -> None:
        self._config = config
        self._boots: Counter[str] = Counter()
        self._bricked: set[str] = set()
        self._wiped: set[str] = set()
        self._to_enrol = len(config.devices)
        self._started = time.monotonic()

    async def run(self, stop: asyncio.Event, ready: Callable[[], None]) -> None:
        """Bring all devices to life, and end them when `stop` is set."""
        config = self._config
        assert config.base is not None
        base = config.base.read_bytes()
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(timeout=60, limits=limits) as http:
            online_events = {entry.device_id: asyncio.Event() for entry in config.devices}
            storages = {entry.device_id: self._storage(entry, base) for entry in config.devices}
            lives = [
                asyncio.create_task(self._life(entry, storages[entry.device_id], http, online_events[entry.device_id]))
                for entry in config.devices
            ]
            online = [
                online_events[entry.device_id].wait()
                for entry in config.devices
                if not config.faults.is_late(entry.device_id)
            ]
            announce = asyncio.create_task(_announce(online, ready))
            try:
                await stop.wait()
            finally:
                for task in (*lives, announce):
                    task.cancel()
                results = await asyncio.gather(*lives, announce, return_exceptions=True)
            for result in results:
                if isinstance(result, Exception):
                    raise result

    def report(self) -> tuple[DeviceReport, ...]:
        """From the disk: what would be found there after a power cut now."""
        return tuple(self._report(entry) for entry in self._config.devices)

    def _report(self, entry: FleetDevice) -> DeviceReport:
        storage = PosixStorage(self._folder(entry))
        record = Slots(storage).load()
        active = record.slot(record.active)
        image = Slots(storage).image(record.active)
        return DeviceReport(
            device_id=entry.device_id,
            version=active.version,
            sha256=hashlib.sha256(image).hexdigest(),
            slot=record.active,
            boots=self._boots[entry.device_id],
            installs=record.writes,
            outcomes={
                job: ended.status
                for store in (StateStore(storage), TaskStore(storage))
                for job, ended in store.state.finished.items()
            },
            bricked=entry.device_id in self._bricked,
            wiped=entry.device_id in self._wiped,
        )

    def _folder(self, entry: FleetDevice) -> Path:
        assert self._config.state_dir is not None
        return self._config.state_dir / entry.device_id

    def _storage(self, entry: FleetDevice, base: bytes) -> FaultyStorage:
        folder = self._folder(entry)
        folder.mkdir(parents=True, exist_ok=True)
        storage = FaultyStorage(folder, entry.device_id, self._config.faults)
        if not Slots(storage).made():
            Slots(storage).make(base, self._config.base_version)
        return storage

    async def _life(
        self, entry: FleetDevice, storage: FaultyStorage, http: httpx.AsyncClient, online: asyncio.Event
    ) -> None:
        faults = self._config.faults
        if faults.is_late(entry.device_id):
            await asyncio.sleep(self._config.late_seconds * chance(faults.seed, entry.device_id, "late by"))
        try:
            enrolled = await self._enrol(entry, storage)
            thing = enrolled.credentials.thing_name if enrolled else entry.device_id
            await self._device(thing, entry, storage, http, enrolled, online).life()
            self._wiped.add(entry.device_id)
        except BrickedError as error:
            self._bricked.add(entry.device_id)
            print(f"{entry.device_id}: {error}", file=sys.stderr, flush=True)
        except CredentialError as error:
            print(f"{entry.device_id}: {error}", file=sys.stderr, flush=True)
            if not isinstance(error, WipedError):
                raise
            self._wiped.add(entry.device_id)

    async def _enrol(self, entry: FleetDevice, storage: FaultyStorage) -> Enrolled | None:
        """The device's credentials, got where it has none."""
        enrolment = self._config.enrolment
        if enrolment is None:
            return None
        credentials, trust = Credentials(storage), Trust(self._config.broker.ca, storage)
        server = enrolment.server.believed_by(trust)
        await enrol_for_good(credentials, server, enrolment.claim, entry.serial_number)
        self._to_enrol -= 1
        if self._to_enrol == 0:
            seconds = time.monotonic() - self._started
            print(f"enrolled: {len(self._config.devices)} devices in {seconds:.1f} s", file=sys.stderr, flush=True)
            if enrolment.report_file is not None:
                found = {"enrolled": len(self._config.devices), "seconds": round(seconds, 2)}
                enrolment.report_file.write_bytes(orjson.dumps(found) + b"\n")
        return Enrolled(credentials, server, entry.serial_number, trust)

    def _device(
        self,
        thing: str,
        entry: FleetDevice,
        storage: FaultyStorage,
        http: httpx.AsyncClient,
        enrolled: Enrolled | None,
        online: asyncio.Event,
    ) -> Device:
        config, faults = self._config, self._config.faults
        slow = config.slow_bytes_per_second if faults.is_slow(entry.device_id) else None

        def behave(boot: Boot, image: bytes) -> Behaviour:
            if not boot.trial:
                return behaviour_of(image)
            return _BEHAVIOUR.get(faults.fate(entry.device_id, boot.version), behaviour_of(image))

        def watch(boot: Boot) -> None:
            self._boots[entry.device_id] += 1

        settings = DeviceConfig(
            Identity(thing, entry.hardware, config.keys, config.product),
            config.broker,
            config.timing,
            config.patience,
            DownloadPolicy(bytes_per_second=slow),
        )
        rng = random.Random(f"{faults.seed}/{entry.device_id}")
        return Device(
            settings,
            storage,
            http=http,
            behave=behave,
            rng=rng,
            watch=watch,
            enrolled=enrolled,
            online=online,
            custom=_faulty(config.custom, faults) if config.custom else None,
        )


def _faulty(custom: Custom, faults: FaultPlan) -> Custom:
    """A custom operation that fails where it is fated to; no other task has a part that could."""

    async def carry_out(task: Task) -> Mapping[str, str]:
        if faults.fate(task.device_id, task.key) is Fate.FAIL:
            raise TaskError(FailureClass.INTERNAL, "custom has failed (simulated fault)")
        return await custom(task)

    return carry_out


async def _announce(online: Sequence[Coroutine[Any, Any, bool]], ready: Callable[[], None]) -> None:
    await asyncio.gather(*online)
    ready()
