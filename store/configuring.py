"""Configurations as a workflow deals with them: want one, see whether it has been taken, wait no longer.

Each method is one transaction and can be repeated. What a device reported is store/configurations.py's.
"""

import time
from dataclasses import dataclass

import orjson
from psycopg import AsyncConnection

from domain.configurations import DeviceConfig, delta_message
from domain.standing import why_not_configure
from models.errors import NotFoundError
from models.identity import ConfigurationView, DeviceHappening
from models.ids import configure_workflow_id
from models.lifecycle import EndConfigurationInput, WantConfigurationInput, WantedConfiguration
from store.audit import append_audit
from store.configurations import history, load_configurations, set_desired
from store.engine import Database
from store.lifecycle import refuse, standing
from store.waits import expect, forget


@dataclass
class ConfiguringStore:
    """See the module. `db` must be open."""

    db: Database

    async def want(self, asked: WantConfigurationInput) -> WantedConfiguration:
        """Want a configuration, and wait for the device's word unless it runs it already.

        The device's row is held from the first statement on, by whoever takes its reports too: a report has either been
        seen here, or finds the wait. Raises NotFoundError, RefusedError, InvalidInputError.
        """
        async with self.db.pool.connection() as connection:
            refuse(why_not_configure(await standing(connection, asked.device_id, lock=True)))
            version = await set_desired(connection, asked.device_id, asked.config, asked.actor, asked.reason)
            applied = await _is_applied(connection, await _load(connection, asked.device_id), version)
            if not applied:
                await expect(connection, asked.device_id, asked.workflow_id, {DeviceHappening.CONFIGURED: version})
            return WantedConfiguration(version=version, applied=applied)

    async def difference(self, device_id: str, version: int) -> bytes | None:
        """What the device has not reported, as its shadow's delta; None where it runs the version or a later one.

        Raises RefusedError for a device that is not heard any more; nothing is waited for then.
        """
        async with self.db.pool.connection() as connection:
            refused = why_not_configure(await standing(connection, device_id))
            if refused is not None:
                await forget(connection, configure_workflow_id(device_id))
        refuse(refused)
        async with self.db.pool.connection() as connection:
            config = await _load(connection, device_id)
            if await _is_applied(connection, config, version):
                return None
        now = time.time()
        message = delta_message(config, now) or {
            "version": config.document_version,
            "timestamp": int(now),
            "state": {},
        }
        return orjson.dumps(message)

    async def end(self, asked: EndConfigurationInput) -> bool:
        """Wait no longer; whether the device runs it after all. What is wanted stays wanted."""
        async with self.db.pool.connection() as connection:
            await forget(connection, asked.workflow_id)
            config = await _load(connection, asked.device_id)
            if await _is_applied(connection, config, asked.version):
                return True
            details = {"version": asked.version, "reported": config.reported_version}
            await append_audit(
                connection, "tidegate", "configuration.unanswered", "device", asked.device_id, asked.reason, details
            )
            return False

    async def history(self, device_id: str, limit: int = 20) -> tuple[DeviceConfig, list[ConfigurationView]]:
        """Where a device stands, and what was wanted of it, the newest first. Raises NotFoundError."""
        async with self.db.pool.connection() as connection:
            return await _load(connection, device_id), await history(connection, device_id, limit)


async def _load(connection: AsyncConnection, device_id: str) -> DeviceConfig:
    found = (await load_configurations(connection, [device_id])).get(device_id)
    if found is None:
        raise NotFoundError(f"no device with the id {device_id!r}; 'device list' shows those there are")
    return found


async def _is_applied(connection: AsyncConnection, config: DeviceConfig, version: int) -> bool:
    """Whether the device runs this version; where a later one is wanted by now, whether it ever took one from here on."""
    if config.desired_version == version:
        return config.in_sync
    cursor = await connection.execute(
        "SELECT EXISTS (SELECT FROM device_configurations WHERE device_id = %s AND version >= %s "
        "AND acknowledged_at IS NOT NULL)",
        (config.device_id, version),
    )
    row = await cursor.fetchone()
    return row is not None and bool(row[0])
