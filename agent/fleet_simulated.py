"""A fleet of simulated devices in one process: their MQTT connections, and the sweep that wakes them."""

import asyncio
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence

from agent.client import Broker
from agent.faults import chance
from agent.fleet_config import DeviceReport, FleetConfig, FleetDevice
from agent.simulated import ModelSlots, Rhythm, SimulatedDevice, filters_of, sweep
from agent.wire import WireSession
from models.errors import InvalidInputError

CONNECTS_AT_ONCE = 200
SPARE_FILES = 500
PING_SECONDS = 240


class SimulatedFleet:
    """Devices of agent.simulated, on connections of their own or on shared ones."""

    def __init__(self, config: FleetConfig) -> None:
        self._config = config
        self._devices: list[SimulatedDevice] = []
        self._sessions: list[_Session] = []

    async def run(self, stop: asyncio.Event, ready: Callable[[], None]) -> None:
        """Connect all, and let them work until `stop` is set."""
        config = self._config
        shares = config.connections or len(config.devices)
        _allow_files(shares + SPARE_FILES)
        groups = [config.devices[start::shares] for start in range(min(shares, len(config.devices)))]
        self._sessions = [self._session(group) for group in groups]
        early = [session for session in self._sessions if not session.late]
        late = [asyncio.create_task(self._arrive(session)) for session in self._sessions if session.late]
        waiting = iter(early)
        await asyncio.gather(*(_connect_each(waiting) for _ in range(CONNECTS_AT_ONCE)))
        ready()
        if config.ask_on_connect:
            for session in early:
                session.ask()
        tasks = [asyncio.create_task(sweep(self._devices, stop)), asyncio.create_task(self._keep(stop)), *late]
        await stop.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for session in self._sessions:
            session.close()
        await asyncio.sleep(0.05)

    def report(self) -> tuple[DeviceReport, ...]:
        """From the devices' boot records."""
        return tuple(
            DeviceReport(
                device_id=device.device_id,
                version=device.running.version,
                sha256=device.running.sha256,
                slot=device.slot,
                boots=device.boots,
                installs=device.installs,
                outcomes=device.outcomes,
            )
            for device in self._devices
        )

    def _session(self, group: Sequence[FleetDevice]) -> "_Session":
        config = self._config
        late = config.connections is None and config.faults.is_late(group[0].device_id)
        session = _Session(config.broker, f"fleet-{group[0].device_id}" if len(group) > 1 else group[0].device_id, late)
        patience, timing = config.patience, config.timing
        rhythm = Rhythm(patience.answer_seconds, timing.retry_seconds, timing.poll_seconds)
        for entry in group:
            device = SimulatedDevice(
                entry.device_id,
                entry.hardware,
                config.keys,
                ModelSlots(config.base_version, config.base_sha256),
                config.faults.fate,
                session.publish,
                rhythm,
            )
            session.devices[entry.device_id] = device
            self._devices.append(device)
        return session

    async def _arrive(self, session: "_Session") -> None:
        name = next(iter(session.devices))
        await asyncio.sleep(self._config.late_seconds * chance(self._config.faults.seed, name, "late by"))
        await session.connect()
        session.ask()

    async def _keep(self, stop: asyncio.Event) -> None:
        """Bring lost connections back, each after a pause of its own; ping the quiet ones."""
        pinged = time.monotonic()
        while not stop.is_set():
            await asyncio.sleep(0.5)
            lost = [session for session in self._sessions if session.lost and random.random() < 0.25][:CONNECTS_AT_ONCE]
            results = await asyncio.gather(*(session.connect() for session in lost), return_exceptions=True)
            for session, result in zip(lost, results, strict=True):
                if result is None:
                    session.again()
            if time.monotonic() - pinged > PING_SECONDS:
                pinged = time.monotonic()
                for session in self._sessions:
                    session.ping()


class _Session:
    """One MQTT connection with the devices that use it."""

    def __init__(self, broker: Broker, client_id: str, late: bool) -> None:
        self.devices: dict[str, SimulatedDevice] = {}
        self.late = late
        self.lost = False
        self._broker = broker
        self._client_id = client_id
        self._wire: WireSession | None = None

    async def connect(self) -> None:
        """Connect and subscribe. Raises OSError."""
        filters = [name for device_id in self.devices for name in filters_of(device_id)]
        _, wire = await asyncio.get_running_loop().create_connection(
            lambda: WireSession(self._client_id, filters, self._receive, self._down),
            self._broker.host,
            self._broker.port,
        )
        async with asyncio.timeout(60):
            await wire.ready
        self._wire, self.lost = wire, False

    def publish(self, topic: str, payload: bytes) -> None:
        """Send for one of the devices; while the connection is down the sweep sends it again."""
        if self._wire is not None:
            self._wire.publish(topic, payload)

    def ask(self) -> None:
        """Let every device ask for work."""
        for device in self.devices.values():
            device.ask()

    def again(self) -> None:
        """After a reconnection: repeat what was under way."""
        for device in self.devices.values():
            device.again()

    def ping(self) -> None:
        """Keep the connection open."""
        if self._wire is not None:
            self._wire.ping()

    def close(self) -> None:
        """End the connection for good."""
        if self._wire is not None:
            self._wire.close()

    def _receive(self, topic: str, payload: memoryview) -> None:
        parts = topic.split("/", 3)
        device = self.devices.get(parts[1] if parts[0] == "devices" else parts[2])
        if device is not None:
            device.receive(topic, payload)

    def _down(self) -> None:
        if self._wire is not None:
            self._wire, self.lost = None, True


async def _connect_each(sessions: Iterator[_Session]) -> None:
    """One of several that share the iterator: no more connections are being made at once than there are of these."""
    for session in sessions:
        await session.connect()


def _allow_files(wanted: int) -> None:
    """Raise the soft limit of open files. Raises InvalidInputError when the hard limit is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise InvalidInputError(
            f"cannot open {wanted} connections: the hard limit of open files is {hard}; raise it, or share connections "
            "with --connections"
        )
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
