"""The device's configuration: the named shadow `config`, and the newest version of it that this device has applied.

The gateway wants `{"version": n, "config": {...}}`. The device keeps it durably, applies it, and reports the same; a
version below the one it has is not applied, for it is an old message. It reports once after each start, whatever the
registry has: a provisioning waits for the word of this life, not of the one before. After a reboot, or a power cut at
any moment, it runs what it had kept; with a wipe that goes, too. `heartbeatSeconds` is the one key that the reference
device acts on; it keeps and reports all.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.client import JobsClient
from agent.credentials import CONFIGURATION_NAME
from agent.errors import RecordError, RequestError
from agent.records import decode_record, encode_record
from agent.storage import Storage, replace_durably
from models.protocol import config_topic

RECORD_KIND = "configuration"
MAX_VERSION = 2**53
LEAST_BEAT_SECONDS, MOST_BEAT_SECONDS = 1, 86_400


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the device runs with. Version 0: nothing has ever been configured."""

    version: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def heartbeat_seconds(self) -> float | None:
        """The rhythm it asks for; None where it asks for none that makes sense."""
        value = self.config.get("heartbeatSeconds")
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        return float(value) if LEAST_BEAT_SECONDS <= value <= MOST_BEAT_SECONDS else None


class ConfigurationStore:
    """The configuration on the device's storage. One that cannot be read counts as none, and is asked for again."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.current = self._load()

    def take(self, wanted: Configuration) -> bool:
        """Keep and use what is wanted, unless it is older than what runs. Whether anything changed. Raises OSError."""
        if wanted.version < self.current.version or wanted == self.current:
            return False
        fields = {"version": wanted.version, "config": dict(wanted.config)}
        replace_durably(self._storage, CONFIGURATION_NAME, encode_record(RECORD_KIND, fields))
        self.current = wanted
        return True

    def _load(self) -> Configuration:
        data = self._storage.read(CONFIGURATION_NAME)
        if data is None:
            return Configuration()
        try:
            return Configuration(**decode_record(data, RECORD_KIND))
        except RecordError:
            return Configuration()


def parse_section(section: Any) -> Configuration | None:
    """A `desired` or `reported` section; None for anything that is not one."""
    if not isinstance(section, Mapping):
        return None
    version, config = section.get("version"), section.get("config")
    if type(version) is not int or not 1 <= version <= MAX_VERSION or not isinstance(config, Mapping):
        return None
    return Configuration(version, dict(config))


class Configurator:
    """Brings the device to the configuration that is wanted, and says so."""

    def __init__(
        self, client: JobsClient, store: ConfigurationStore, poll_seconds: float, retry_seconds: float
    ) -> None:
        self._client = client
        self._store = store
        self._poll_seconds = poll_seconds
        self._retry_seconds = retry_seconds
        self._has_reported = False
        self._one_at_a_time = asyncio.Lock()

    async def run(self) -> None:
        """With every connection and every hint; and again after a while, when nobody answered."""
        failures = 0
        while True:
            await self._client.connected.wait()
            self._client.config_hint.clear()
            try:
                await self.once()
                failures, seconds = 0, self._poll_seconds
            except (RequestError, OSError):
                failures += 1
                seconds = min(self._poll_seconds, self._retry_seconds * 2.0 ** min(failures, 20))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds * self._client.rng.uniform(0.5, 1.5)):
                    await self._client.config_hint.wait()

    async def once(self) -> None:
        """Ask, apply, report. Raises RequestError, OSError."""
        async with self._one_at_a_time:
            await self._once()

    async def _once(self) -> None:
        thing = self._client.thing
        try:
            answer = await self._client.ask(config_topic(thing, "get"), {})
        except RequestError as error:
            if getattr(error, "code", None) == "404":  # no configuration was ever wanted or reported
                return
            raise
        state = answer.get("state")
        sections = state if isinstance(state, Mapping) else {}
        wanted = parse_section(sections.get("desired"))
        if wanted is not None:
            self._store.take(wanted)
        current = self._store.current
        if current.version and not (self._has_reported and parse_section(sections.get("reported")) == current):
            reported = {"version": current.version, "config": dict(current.config)}
            await self._client.ask(config_topic(thing, "update"), {"state": {"reported": reported}})
            self._has_reported = True
