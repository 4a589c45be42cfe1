"""Configurations of devices: what is wanted, what each device says it runs, and every version that was ever wanted.

`devices` holds the newest of both sides, `device_configurations` the history. A version is given here, never by a device,
and names one configuration for ever. What a report means is domain/configurations.py's.

```python
version = await set_desired(connection, "motor-7", {"interval": 5}, "alice", "sample more often")
```
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import orjson
from psycopg import AsyncConnection
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from domain.configurations import MAX_CONFIG_BYTES, MAX_CONFIG_DEPTH, ConfigReport, ConfigState, DeviceConfig
from domain.differences import depth_of
from domain.strict_json import parse_object
from models.errors import InvalidInputError, NotFoundError
from models.identity import ConfigurationView, DeviceHappening
from store.audit import append_audit
from store.waits import happened

CONFIG_STATE = """
CASE WHEN d.desired_config_version = 0 OR d.desired_config IS NULL THEN 'none'
     WHEN d.config_version = d.desired_config_version AND d.config = d.desired_config THEN 'in-sync'
     WHEN d.config_version < d.desired_config_version AND NOT EXISTS (
         SELECT FROM device_configurations c WHERE c.device_id = d.device_id AND c.version = d.desired_config_version
         AND c.acknowledged_at IS NOT NULL) THEN 'pending'
     ELSE 'drifted' END
"""
"""`DeviceConfig.state` as SQL over `devices d`."""

_LOCK = """
SELECT desired_config, desired_config_version, config_version FROM devices WHERE device_id = %s FOR NO KEY UPDATE
"""

_WANT = """
UPDATE devices SET desired_config = %s, desired_config_version = %s, updated_at = now(),
       config_document_version = config_document_version + 1
WHERE device_id = %s
"""

_REMEMBER = """
INSERT INTO device_configurations (device_id, version, config, actor, reason) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (device_id, version) DO NOTHING
"""

_WANT_OF_MANY = """
WITH chosen AS (
    SELECT d.device_id, COALESCE(NULLIF(d.desired_config_version, 0), d.config_version) + 1 AS version FROM devices d
    WHERE d.device_id = ANY(ARRAY(SELECT jsonb_array_elements_text(%(ids)s::jsonb)))
      AND (d.desired_config_version = 0 OR d.desired_config IS DISTINCT FROM %(config)s::jsonb)
    ORDER BY d.device_id FOR NO KEY UPDATE
), wanted AS (
    UPDATE devices d SET desired_config = %(config)s::jsonb, desired_config_version = c.version, updated_at = now(),
      config_document_version = config_document_version + 1
    FROM chosen c WHERE c.device_id = d.device_id RETURNING d.device_id, c.version
), remembered AS (
    INSERT INTO device_configurations (device_id, version, config, actor, reason)
    SELECT device_id, version, %(config)s::jsonb, %(actor)s, %(reason)s FROM wanted
    ON CONFLICT (device_id, version) DO NOTHING
)
INSERT INTO audit_events (actor, action, subject_kind, subject, reason, details)
SELECT %(actor)s, 'configuration.wanted', 'device', device_id, %(reason)s, jsonb_build_object('version', version)
FROM wanted
"""

_LOAD = """
SELECT d.device_id, d.desired_config, d.desired_config_version, d.config, d.config_version, d.config_document_version,
       extract(epoch FROM c.created_at)::float8, extract(epoch FROM d.config_reported_at)::float8,
       c.acknowledged_at IS NOT NULL
FROM devices d LEFT JOIN device_configurations c
  ON c.device_id = d.device_id AND c.version = d.desired_config_version
WHERE d.device_id = ANY(ARRAY(SELECT jsonb_array_elements_text(%s::jsonb)))
ORDER BY d.device_id FOR NO KEY UPDATE OF d
"""

_VERSIONS = """
SELECT c.device_id, c.version, c.config
FROM jsonb_to_recordset(%s::jsonb) AS r(device_id text, version int)
JOIN device_configurations c USING (device_id, version)
"""

_SAVE = """
UPDATE devices d SET config = n.config, config_version = n.version, config_document_version = n.document_version,
  config_reported_at = to_timestamp(n.reported_at),
  updated_at = CASE WHEN (d.config, d.config_version) IS DISTINCT FROM (n.config, n.version) THEN now()
                    ELSE d.updated_at END
FROM jsonb_to_recordset(%s::jsonb)
  AS n(device_id text, config jsonb, version int, document_version bigint, reported_at float8)
WHERE d.device_id = n.device_id
"""

_ACKNOWLEDGE = """
UPDATE device_configurations c SET acknowledged_at = now()
FROM jsonb_to_recordset(%s::jsonb) AS n(device_id text, version int)
WHERE c.device_id = n.device_id AND c.version = n.version AND c.acknowledged_at IS NULL
"""


def check_config(config: dict[str, Any]) -> None:
    """Raise InvalidInputError for a configuration that no device could be given."""
    try:
        parse_object(json.dumps(config))
    except ValueError as error:
        raise InvalidInputError(f"cannot use the configuration: {error}") from error
    if (size := len(orjson.dumps(config))) > MAX_CONFIG_BYTES:
        raise InvalidInputError(f"cannot use the configuration: {size} bytes as JSON, at most {MAX_CONFIG_BYTES}")
    if (depth := depth_of(config)) > MAX_CONFIG_DEPTH:
        raise InvalidInputError(f"cannot use the configuration: {depth} levels deep, at most {MAX_CONFIG_DEPTH}")


async def set_desired(
    connection: AsyncConnection, device_id: str, config: dict[str, Any], actor: str, reason: str = ""
) -> int:
    """Want this configuration of a device from now on; its version.

    Idempotent: what is wanted already keeps its version, whether the device has taken it or not. Raises NotFoundError,
    or InvalidInputError for a configuration that is too large, too deep, or no JSON.
    """
    check_config(config)
    row = await (await connection.execute(_LOCK, (device_id,))).fetchone()
    if row is None:
        raise NotFoundError(f"cannot configure {device_id}: no device has this id")
    wanted, version, reported_version = row
    if not version or wanted != config or _types_differ(wanted, config):
        # A first version is above what the device was imported with, or it would seem to have taken it.
        version = (version or reported_version) + 1
        await connection.execute(_WANT, (Jsonb(config), version, device_id))
        details = {"version": version}
        await append_audit(connection, actor, "configuration.wanted", "device", device_id, reason, details)
    await connection.execute(_REMEMBER, (device_id, version, Jsonb(config), actor, reason))
    return int(version)


async def want_of_many(
    connection: AsyncConnection, device_ids: Sequence[str], config: dict[str, Any], actor: str, reason: str = ""
) -> int:
    """`set_desired` for many devices in one statement; of how many it was not wanted before."""
    ids = orjson.dumps(list(device_ids)).decode()
    arguments = {"ids": ids, "config": Jsonb(config), "actor": actor, "reason": reason}
    return (await connection.execute(_WANT_OF_MANY, arguments)).rowcount


def _types_differ(one: Any, other: Any) -> bool:
    """Python takes `True == 1`; JSON does not."""
    return orjson.dumps(one, option=orjson.OPT_SORT_KEYS) != orjson.dumps(other, option=orjson.OPT_SORT_KEYS)


async def load_configurations(
    connection: AsyncConnection, device_ids: Iterable[str], reports: Sequence[tuple[str, int]] = ()
) -> dict[str, DeviceConfig]:
    """Lock these devices' rows, and read their configurations.

    Args:
        device_ids: whose. A device that is not in the registry is not in the answer.
        reports: (device, version) that devices are about to report: what those versions were is loaded with them.
    """
    ids = orjson.dumps(sorted(set(device_ids))).decode()
    rows = await (await connection.execute(_LOAD, (ids,))).fetchall()
    found = {
        row[0]: DeviceConfig(row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7], row[8]) for row in rows
    }
    older = [
        {"device_id": device, "version": version}
        for device, version in set(reports)
        if device in found and version != found[device].desired_version
    ]
    if older:
        rows = await (await connection.execute(_VERSIONS, (orjson.dumps(older).decode(),))).fetchall()
        for device, version, config in rows:
            found[device].versions[version] = config
    return found


async def save_configurations(connection: AsyncConnection, configs: Iterable[DeviceConfig]) -> None:
    """Write back what devices reported, and tell the workflows that wait for it."""
    changed = [config for config in configs if config.changed]
    if not changed:
        return
    rows = [
        {
            "device_id": config.device_id,
            "config": config.reported,
            "version": config.reported_version,
            "document_version": config.document_version,
            "reported_at": config.reported_at,
        }
        for config in changed
    ]
    await connection.execute(_SAVE, (orjson.dumps(rows).decode(),))
    confirmed = [{"device_id": config.device_id, "version": v} for config in changed for v in sorted(config.confirmed)]
    if confirmed:
        await connection.execute(_ACKNOWLEDGE, (orjson.dumps(confirmed).decode(),))
        newest = {config.device_id: max(config.confirmed) for config in changed if config.confirmed}
        await happened(
            connection,
            [(device, DeviceHappening.CONFIGURED, {"version": version}) for device, version in newest.items()],
        )


async def report(
    connection: AsyncConnection, device_id: str, version: int, config: dict[str, Any] | None = None
) -> ConfigState:
    """One report, as the gateway takes it in a batch; where the device stands with it. Raises NotFoundError."""
    configs = await load_configurations(connection, [device_id], [(device_id, version)])
    if device_id not in configs:
        raise NotFoundError(f"cannot take the report of {device_id}: no device has this id")
    row = await (await connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8")).fetchone()
    assert row is not None
    configs[device_id].report(ConfigReport(version, config), row[0])
    await save_configurations(connection, configs.values())
    return configs[device_id].state


async def config_state(connection: AsyncConnection, device_id: str) -> ConfigState:
    """Where a device stands. Raises NotFoundError."""
    cursor = await connection.execute(
        f"SELECT {CONFIG_STATE} FROM devices d WHERE device_id = %s".encode(), (device_id,)
    )
    if (row := await cursor.fetchone()) is None:
        raise NotFoundError(f"no device with the id {device_id}")
    return ConfigState(row[0])


async def history(connection: AsyncConnection, device_id: str, limit: int = 20) -> list[ConfigurationView]:
    """The versions that were wanted, the newest first."""
    async with connection.cursor(row_factory=class_row(ConfigurationView)) as cursor:
        await cursor.execute(
            "SELECT device_id, version, config, actor, reason, created_at, acknowledged_at FROM device_configurations "
            "WHERE device_id = %s ORDER BY version DESC LIMIT %s",
            (device_id, limit),
        )
        return await cursor.fetchall()
