"""One device from reset to reset: what runs between two jumps of the boot loader.

`Device.life` is a device in a process of many (the fleet); `python -m agent` gives every boot a process of its own.
Both go through `run_boot`, so what is tested in one holds in the other.

The trial's deadline, stated once: an unconfirmed image has `confirm_seconds` to get an accepted `confirming`; then the
device resets, which costs one of its tries. A gateway or broker that is away during a trial is therefore survived for
tries x `confirm_seconds`; after that the old image comes back, and the server may grant another attempt.
"""

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import httpx

from agent.bootloader import Boot, BootLoader
from agent.client import Broker, JobsClient, MqttReports, Patience
from agent.commands import Commander, Enrolled, Rhythm
from agent.configuration import ConfigurationStore, Configurator
from agent.diagnoser import Diagnoser
from agent.diagnostics import Diagnostics, LinuxSurroundings
from agent.download import Downloader, DownloadPolicy
from agent.errors import RejectedError, UnansweredError
from agent.image import Behaviour, behaviour_of, version_in
from agent.logbook import LogBook
from agent.passports import Passports
from agent.reboot import RebootGuard
from agent.shadow import ShadowKeeper
from agent.slots import Slots
from agent.storage import Storage
from agent.tasks import Abilities, Custom, Tasker, next_leg
from agent.updater import Identity, Leg, Updater
from agent.vitals import Read, modelled


class Reset(StrEnum):
    """Why a boot ended. STOPPED: somebody wants the program to end, the device itself would go on. WIPED: it has no
    credentials any more, by command."""

    REQUESTED = "requested"
    CRASH = "crash"
    WATCHDOG = "watchdog"
    UNCONFIRMED = "unconfirmed"
    STOPPED = "stopped"
    WIPED = "wiped"


@dataclass(frozen=True, slots=True)
class Timing:
    """A device's rhythm, in seconds. `retry`: after a hint that brought nothing, doubled up to `poll`."""

    poll_seconds: float = 900.0
    retry_seconds: float = 2.0
    heartbeat_seconds: float = 60.0
    confirm_seconds: float = 300.0
    watchdog_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """A device's identity and surroundings."""

    identity: Identity
    broker: Broker
    timing: Timing = field(default_factory=Timing)
    patience: Patience = field(default_factory=Patience)
    download: DownloadPolicy = field(default_factory=DownloadPolicy)
    vitals: Read = modelled


Behave = Callable[[Boot, bytes], Behaviour]
Watch = Callable[[Boot], None]


def _as_the_image_says(boot: Boot, image: bytes) -> Behaviour:
    return behaviour_of(image)


async def _sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)


class Device:
    """A device with its storage. `behave` decides what an image does when it runs; `online` is set once it has connected.

    `custom` does what custom tasks of fleet jobs say; without it they are rejected.
    """

    def __init__(
        self,
        config: DeviceConfig,
        storage: Storage,
        *,
        http: httpx.AsyncClient,
        behave: Behave = _as_the_image_says,
        hang: Callable[[float], Awaitable[None]] = _sleep,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        watch: Watch | None = None,
        enrolled: Enrolled | None = None,
        online: asyncio.Event | None = None,
        custom: Custom | None = None,
    ) -> None:
        self._config = config
        self._storage = storage
        self._http = http
        self._behave = behave
        self._hang = hang
        self._clock = clock
        self._rng = rng or random.Random()
        self._watch = watch
        self._enrolled = enrolled
        self._custom = custom
        self.online = online or asyncio.Event()
        self.log = LogBook(clock)
        self._configuration = ConfigurationStore(storage)
        self._boot_id = secrets.token_hex(8)
        self._started = time.monotonic()

    async def life(self) -> None:
        """Boot, run, reset, until the device is wiped. Raises BrickedError when nothing can be booted any more."""
        reset = Reset.REQUESTED
        while reset is not Reset.WIPED:
            reset = await self.run_boot(BootLoader(Slots(self._storage)).boot())

    async def run_boot(self, boot: Boot) -> Reset:
        """Run what was booted, until the device resets."""
        self._started, self._boot_id = time.monotonic(), secrets.token_hex(8)
        self._configuration = ConfigurationStore(self._storage)
        if self._watch is not None:
            self._watch(boot)
        self._note_boot(boot)
        image = Slots(self._storage).image(boot.slot)
        match behaviour := self._behave(boot, image):
            case Behaviour.CRASH:
                await asyncio.sleep(0)
                return Reset.CRASH
            case Behaviour.HANG:
                await self._hang(self._config.timing.watchdog_seconds)
                return Reset.WATCHDOG
            case Behaviour.SILENT:
                await asyncio.Event().wait()
        return await self._run(boot, image, behaviour)

    async def _run(self, boot: Boot, image: bytes, behaviour: Behaviour) -> Reset:
        thing, passports = self._config.identity.device_id, None
        if self._enrolled is not None:
            passports = Passports(self._enrolled.credentials, self._enrolled.trust)
        client = JobsClient(thing, self._config.broker, self._config.patience, self._rng, passports, self.log)

        async def self_test() -> str | None:
            return _self_test(boot, image, behaviour)

        downloader = Downloader(self._storage, self._http, self._config.download)
        updater = Updater(self._config.identity, boot, self._storage, downloader, self._clock, self_test)
        configurator, diagnoser = self._configurator(client), self._diagnoser(client, updater)
        tasker = self._tasker(client, configurator, diagnoser)
        wiping: asyncio.Task[None] | None = None
        rebooting: asyncio.Task[None] | None = None
        async with asyncio.TaskGroup() as tasks:
            helpers, ends = [], []
            if behaviour is not Behaviour.NO_NETWORK:
                parts = (
                    client.run(),
                    self._beat(client, boot),
                    self._announce(client),
                    configurator.run(),
                    ShadowKeeper(client, self._config.timing.poll_seconds, self._config.timing.retry_seconds).run(),
                )
                helpers = [tasks.create_task(part) for part in parts]
                rebooting = tasks.create_task(diagnoser.run())
                ends.append(rebooting)
                if passports is not None:
                    wiping = tasks.create_task(self._commander(client, passports).run())
                    ends.append(wiping)
            work = tasks.create_task(self._work(updater, tasker, client))
            ends.append(work)
            if boot.trial:
                helpers.append(tasks.create_task(self._guard(updater, work)))
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                wiped, ordered = _has_ended(wiping), _has_ended(rebooting)
            finally:
                for helper in [*helpers, *ends]:
                    helper.cancel()
        if wiped and self._enrolled is not None:
            self._enrolled.credentials.wipe()
            return Reset.WIPED
        return Reset.UNCONFIRMED if work.cancelled() and not ordered else Reset.REQUESTED

    def _configurator(self, client: JobsClient) -> Configurator:
        timing = self._config.timing
        return Configurator(client, self._configuration, timing.poll_seconds, timing.retry_seconds)

    def _diagnoser(self, client: JobsClient, updater: Updater) -> Diagnoser:
        identity, store = self._config.identity, self._configuration
        surroundings = LinuxSurroundings(lambda: self._storage.path(""), self._uptime, lambda: client.errors)

        def busy() -> str | None:
            return "a new image is on trial" if updater.on_trial else None

        guard = RebootGuard(self._storage, identity.keys, identity.device_id, self._clock, busy)
        return Diagnoser(client, Diagnostics(surroundings, self.log, lambda: store.current, self._clock), guard)

    def _uptime(self) -> float:
        return time.monotonic() - self._started

    def _note_boot(self, boot: Boot) -> None:
        trial = ", on trial" if boot.trial else ""
        self.log.note(f"boot {self._boot_id}: slot {boot.slot} runs {boot.version} ({boot.sha256[:16]}){trial}")
        fallback = Slots(self._storage).load().fallback
        if fallback is not None:
            self.log.note(f"fell back to this image: {fallback.reason}")

    def _commander(self, client: JobsClient, passports: Passports) -> Commander:
        assert self._enrolled is not None
        return Commander(
            client,
            self._storage,
            self._config.identity.keys,
            self._enrolled,
            passports,
            Rhythm(self._config.timing.poll_seconds, self._config.timing.retry_seconds),
            self._clock,
        )

    def _tasker(self, client: JobsClient, configurator: Configurator, diagnoser: Diagnoser) -> Tasker:
        identity = self._config.identity

        async def sync_config() -> int:
            await configurator.once()
            return self._configuration.current.version

        abilities = Abilities(sync_config, diagnoser.respond, self._custom)
        return Tasker(identity.device_id, identity.keys, self._storage, self._boot_id, abilities, self._clock)

    async def _work(self, updater: Updater, tasker: Tasker, client: JobsClient) -> None:
        """Ask for work and do it; returns when the device is to reboot."""
        timing, fruitless = self._config.timing, 0
        while True:
            client.hint.clear()
            found = False
            try:
                execution = await client.start_next(bootId=self._boot_id)
                found = execution is not None
                reports = MqttReports(client, execution) if execution else None
                leg = await next_leg(updater, tasker, execution, reports)
            except (UnansweredError, RejectedError, OSError):
                leg = Leg.WAIT
            if leg is Leg.REBOOT:
                return
            if leg is Leg.IDLE and found:
                fruitless = 0
                continue
            fruitless += 1
            pause = min(timing.poll_seconds, timing.retry_seconds * 2 ** min(fruitless, 20))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause * self._rng.uniform(0.5, 1.5)):
                    await client.hint.wait()
                    fruitless = 0

    async def _guard(self, updater: Updater, work: "asyncio.Task[None]") -> None:
        """The trial's deadline."""
        seconds = self._config.timing.confirm_seconds
        await asyncio.sleep(seconds)
        if updater.on_trial:
            with contextlib.suppress(OSError):
                Slots(self._storage).note_cause(f"no answer from the gateway within {seconds:g} s")
            work.cancel()

    async def _announce(self, client: JobsClient) -> None:
        await client.connected.wait()
        self.online.set()

    async def _beat(self, client: JobsClient, boot: Boot) -> None:
        """Heartbeats, from the first connection on; in the rhythm of the configuration where that says one."""
        if self._config.timing.heartbeat_seconds <= 0:
            return
        while True:
            await client.connected.wait()
            vitals = self._vitals(client, boot)
            if await client.heartbeat(vitals):
                client.errors -= vitals["errorCount"]
            period = self._configuration.current.heartbeat_seconds or self._config.timing.heartbeat_seconds
            await asyncio.sleep(period * self._rng.uniform(0.8, 1.2))

    def _vitals(self, client: JobsClient, boot: Boot) -> dict[str, Any]:
        """A heartbeat; `errorCount` counts from the one before it."""
        return {
            "deviceId": self._config.identity.device_id,
            "timestamp": int(self._clock() * 1000),
            "uptime": int(self._uptime()),
            **self._config.vitals(self._rng),
            "firmwareVersion": boot.version,
            "errorCount": client.errors,
            "firmwareSha256": boot.sha256,
            "bootId": self._boot_id,
        }


def _has_ended(task: "asyncio.Task[None] | None") -> bool:
    """By itself, that is."""
    return task is not None and task.done() and not task.cancelled()


def _self_test(boot: Boot, image: bytes, behaviour: Behaviour) -> str | None:
    """The running image's own check: it works, and it is the one that was signed."""
    if behaviour is Behaviour.SELF_TEST:
        return "the image says that it does not work"
    claimed = version_in(image)
    if claimed is not None and claimed != boot.version:
        return f"the image says it is version {claimed}, the release that was signed is {boot.version}"
    return None
