"""A fleet of real devices in one process: slots on disk, downloads, deltas, an aiomqtt session each.

A reboot ends everything of a device but its folder; the boot loader model decides what comes up again.
"""

import asyncio
import hashlib
import random
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import httpx

from agent.bootloader import Boot
from agent.device import Device, DeviceConfig
from agent.download import DownloadPolicy
from agent.errors import BrickedError
from agent.faults import Fate, FaultPlan, chance
from agent.fleet_config import DeviceReport, FleetConfig, FleetDevice
from agent.image import Behaviour, behaviour_of
from agent.slots import Slots
from agent.state import StateStore
from agent.storage import PosixStorage
from agent.updater import Identity


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

    async def run(self, stop: asyncio.Event, ready: Callable[[], None]) -> None:
        """Bring all devices to life, and end them when `stop` is set."""
        config = self._config
        assert config.base is not None
        base = config.base.read_bytes()
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(timeout=60, limits=limits) as http:
            devices = [self._device(device, base, http) for device in config.devices]
            lives = [
                asyncio.create_task(self._life(device, entry))
                for device, entry in zip(devices, config.devices, strict=True)
            ]
            online = [
                device.online.wait()
                for device, entry in zip(devices, config.devices, strict=True)
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
            outcomes={job: ended.status for job, ended in StateStore(storage).state.finished.items()},
            bricked=entry.device_id in self._bricked,
        )

    def _folder(self, entry: FleetDevice) -> Path:
        assert self._config.state_dir is not None
        return self._config.state_dir / entry.device_id

    def _device(self, entry: FleetDevice, base: bytes, http: httpx.AsyncClient) -> Device:
        config, faults = self._config, self._config.faults
        folder = self._folder(entry)
        folder.mkdir(parents=True, exist_ok=True)
        storage = FaultyStorage(folder, entry.device_id, faults)
        if not Slots(storage).made():
            Slots(storage).make(base, config.base_version)
        slow = config.slow_bytes_per_second if faults.is_slow(entry.device_id) else None

        def behave(boot: Boot, image: bytes) -> Behaviour:
            if not boot.trial:
                return behaviour_of(image)
            return _BEHAVIOUR.get(faults.fate(entry.device_id, boot.version), behaviour_of(image))

        def watch(boot: Boot) -> None:
            self._boots[entry.device_id] += 1

        settings = DeviceConfig(
            Identity(entry.device_id, entry.hardware, config.keys, config.product),
            config.broker,
            config.timing,
            config.patience,
            DownloadPolicy(bytes_per_second=slow),
        )
        rng = random.Random(f"{faults.seed}/{entry.device_id}")
        return Device(settings, storage, http=http, behave=behave, rng=rng, watch=watch)

    async def _life(self, device: Device, entry: FleetDevice) -> None:
        faults = self._config.faults
        if faults.is_late(entry.device_id):
            await asyncio.sleep(self._config.late_seconds * chance(faults.seed, entry.device_id, "late by"))
        try:
            await device.life()
        except BrickedError as error:
            self._bricked.add(entry.device_id)
            print(f"{entry.device_id}: {error}", file=sys.stderr, flush=True)


async def _announce(online: Sequence[Coroutine[Any, Any, bool]], ready: Callable[[], None]) -> None:
    await asyncio.gather(*online)
    ready()
