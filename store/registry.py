"""The device registry: bulk import, single devices, queries by filter. It decides nothing about rollouts.

What a query selects is store/filters.py's; what a row of a file means is domain/device_rows.py's. All statements are
constant text with bound parameters; the only names put into SQL come from the fixed list of columns below.

```python
registry = Registry(db)
result = await registry.import_devices(lines, "fleet.csv", Format.CSV)
page = await registry.find(DeviceFilter(type="motor", tags={"maintenance-due": "<2026-03-12"}))
```
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import orjson
from psycopg import AsyncConnection, DataError, errors, sql
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from domain.device_rows import DeviceRow, Format, read_rows
from domain.mistakes import shown
from models.device import DeviceChanges, DeviceFilter, DeviceRecord, DeviceStatus
from models.errors import ConflictError, ImportRowError, InvalidInputError, Mistake, NotFoundError, RefusedError
from models.views import DevicePage, ImportResult
from store.configurations import CONFIG_STATE
from store.engine import Database
from store.filters import where

MISTAKES_SHOWN = 20
_MERGE_TRIES = 5
_IMPORT_LOCK = 7311464
"""Advisory lock: imports merge one after the other, or two of the same fleet would stand in each other's way."""
_FETCHED_ROWS = 2000
_ANALYZED_ROWS = 1000
"""From so many on, the planner is told at once: a rollout planned right after the import reads the new rows."""

_COLUMNS = (
    "device_id", "device_type", "serial_number", "manufacturer", "site_id", "zone", "tags", "status",
    "firmware_version", "firmware_sha256", "config", "desired_config", "config_version", "retired_at",
)  # fmt: skip
"""What an import writes to `devices`."""
_BIT = {name: 1 << i for i, name in enumerate(_COLUMNS)}
_JSON_COLUMNS = frozenset({"tags", "config", "desired_config"})

_SELECT = f"""
SELECT d.device_id, d.device_type, d.serial_number, d.manufacturer, d.site_id, d.zone, d.tags, d.status,
       d.firmware_version, d.firmware_sha256, d.config, d.desired_config, d.config_version,
       d.created_at, d.updated_at, d.retired_at, p.last_heartbeat, p.uptime, p.offline_since,
       d.desired_config_version, {CONFIG_STATE} AS config_state, d.config_reported_at, d.barred_at, d.barred_reason
FROM devices d LEFT JOIN presence p USING (device_id)
"""

_CREATE_INCOMING = """
CREATE TEMPORARY TABLE incoming (
    line integer, given integer,
    device_id text, device_type text, serial_number text, manufacturer text, site_id text,
    zone text, tags jsonb, status text, firmware_version text, firmware_sha256 text, config jsonb, desired_config jsonb,
    config_version integer, retired_at timestamptz, created_at timestamptz, last_heartbeat timestamptz, uptime bigint
) ON COMMIT DROP
"""
_COPY_INCOMING = f"COPY incoming (line, given, {', '.join(_COLUMNS)}, created_at, last_heartbeat, uptime) FROM STDIN"

_SERIALS_TAKEN = """
SELECT i.line, i.serial_number, d.device_id
FROM incoming i JOIN devices d ON d.serial_number = i.serial_number
WHERE d.device_id <> i.device_id ORDER BY i.line
"""

_NOT_BURIED = (
    "NOT EXISTS (SELECT FROM tombstones t WHERE t.device_id = d.device_id AND t.serial_number = d.serial_number "
    "AND t.released_at IS NULL)"
)
_ANY_BURIED = "SELECT EXISTS (SELECT FROM tombstones WHERE released_at IS NULL)"

_BURIED = f"""
SELECT i.line, i.device_id, t.device_id, t.serial_number, t.retired_at
FROM (
    SELECT i.line, t.tombstone_no FROM incoming i JOIN tombstones t USING (serial_number) WHERE t.released_at IS NULL
    UNION
    SELECT i.line, t.tombstone_no FROM incoming i JOIN tombstones t USING (device_id) WHERE t.released_at IS NULL
) found
JOIN incoming i USING (line) JOIN tombstones t USING (tombstone_no) LEFT JOIN devices d ON d.device_id = i.device_id
WHERE NOT (i.device_id = t.device_id AND i.serial_number = t.serial_number
           AND (i.status = 'retired' OR d.status = 'retired' AND i.given & {_BIT["status"]} = 0))
ORDER BY i.line
"""
"""Rows that would bring back what was decommissioned; a file may still speak of it as retired."""

_LOCK_KNOWN = """
SELECT count(*) FROM (
    SELECT FROM devices d JOIN incoming i USING (device_id) ORDER BY device_id FOR UPDATE OF d
) known
"""


def _merge_statement() -> str:
    """A field that the file says nothing about keeps its value; a row that changes nothing is not written."""
    kept = [f"CASE WHEN i.given & {_BIT[c]} <> 0 OR e.device_id IS NULL THEN i.{c} ELSE e.{c} END AS {c}"
            for c in _COLUMNS if c not in ("device_id", "retired_at")]  # fmt: skip
    written = [c for c in _COLUMNS if c != "device_id"]
    # What is wanted gets a version where it changes, as store.configurations gives it: above the one that is reported.
    first = "CASE WHEN desired_config IS NULL THEN 0 ELSE config_version + 1 END"
    next_version = """CASE WHEN EXCLUDED.desired_config IS NULL OR EXCLUDED.desired_config IS NOT DISTINCT FROM
                d.desired_config THEN d.desired_config_version
             WHEN d.desired_config_version = 0 THEN EXCLUDED.desired_config_version
             ELSE d.desired_config_version + 1 END"""
    return f"""
    WITH wanted AS (
        SELECT i.device_id, i.created_at, {", ".join(kept)},
               CASE WHEN i.given & {_BIT["retired_at"]} <> 0 THEN i.retired_at ELSE e.retired_at END AS retired_at
        FROM incoming i LEFT JOIN devices e USING (device_id)
    ), merged AS (
        INSERT INTO devices AS d ({", ".join(_COLUMNS)}, created_at, desired_config_version)
        SELECT {", ".join(c for c in _COLUMNS if c != "retired_at")},
               CASE WHEN status = 'retired' THEN COALESCE(retired_at, now()) END, COALESCE(created_at, now()), {first}
        FROM wanted
        ON CONFLICT (device_id) DO UPDATE SET updated_at = now(), desired_config_version = {next_version},
               {", ".join(f"{c} = EXCLUDED.{c}" for c in written)}
        WHERE ({", ".join(f"d.{c}" for c in written)}) IS DISTINCT FROM ({", ".join(f"EXCLUDED.{c}" for c in written)})
        RETURNING xmax = 0 AS created
    )
    SELECT count(*) FILTER (WHERE created), count(*) FILTER (WHERE NOT created) FROM merged
    """


_MERGE = _merge_statement()

_MERGE_PRESENCE = """
INSERT INTO presence AS p (device_id, last_heartbeat, uptime)
SELECT device_id, last_heartbeat, uptime FROM incoming WHERE last_heartbeat IS NOT NULL
ON CONFLICT (device_id) DO UPDATE SET last_heartbeat = EXCLUDED.last_heartbeat, uptime = EXCLUDED.uptime
WHERE p.last_heartbeat < EXCLUDED.last_heartbeat
"""


_NEXT_VERSION = """, desired_config_version = CASE WHEN d.desired_config IS NOT DISTINCT FROM %(new_desired_config)s
    THEN d.desired_config_version WHEN d.desired_config_version = 0 THEN d.config_version + 1
    ELSE d.desired_config_version + 1 END"""


class Registry:
    """Devices in PostgreSQL."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # --- import ------------------------------------------------------------------------------------------------------

    async def import_devices(self, lines: Iterable[bytes], source: str, form: Format) -> ImportResult:
        """Create and update devices from a file: all of it, or nothing.

        Args:
            lines: the file's lines; each at most `MAX_LINE_BYTES + 1` bytes.
            source: what to call the file in errors.

        Raises:
            ImportRowError: rows that cannot be taken, the first 20 of them and how many there are.
            InvalidInputError: the file as a whole cannot be read.
        """
        async with self._db.pool.connection() as connection:
            await connection.execute(_CREATE_INCOMING)
            mistakes = _Mistakes(source)
            rows = await _copy(connection, read_rows(lines, form), mistakes)
            mistakes.raise_if_any()
            await connection.execute("ANALYZE incoming")
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_IMPORT_LOCK,))
            await _refuse_taken_serials(connection, mistakes)
            await _refuse_buried(connection, mistakes)
            created, updated = await _merge(connection, source)
            if created + updated >= _ANALYZED_ROWS:
                await connection.execute("ANALYZE devices")
        return ImportResult(rows=rows, created=created, updated=updated, unchanged=rows - created - updated)

    # --- one device --------------------------------------------------------------------------------------------------

    async def create(self, device: DeviceRecord) -> DeviceRecord:
        """Add a device; raises ConflictError when its id or its serial number is taken."""
        values = _row_values(device)
        names = sql.SQL(", ").join(sql.Identifier(name) for name in values)
        marks = sql.SQL(", ").join(sql.Placeholder(name) for name in values)
        statement = sql.SQL("INSERT INTO devices ({}) VALUES ({})").format(names, marks)
        try:
            async with self._db.pool.connection() as connection:
                await _refuse_return(connection, device)
                await connection.execute(statement, values)
        except errors.UniqueViolation as error:
            taken = "serial number" if "serial" in (error.diag.constraint_name or "") else "id"
            raise ConflictError(
                f"cannot create device {device.device_id} with serial number {shown(device.serial_number)}: "
                f"another device has this {taken}; update that one, or choose another"
            ) from error
        except DataError as error:
            raise InvalidInputError(f"cannot create device {device.device_id}: {error}") from error
        return await self.get(device.device_id)

    async def get(self, device_id: str) -> DeviceRecord:
        """The device of this id; raises NotFoundError."""
        if (found := await self._one("d.device_id = %(wanted)s", device_id)) is None:
            raise NotFoundError(f"no device with the id {shown(device_id)}; 'device list' shows those there are")
        return found

    async def get_by_serial(self, serial_number: str) -> DeviceRecord:
        """The device of this serial number; raises NotFoundError."""
        if (found := await self._one("d.serial_number = %(wanted)s", serial_number)) is None:
            raise NotFoundError(f"no device with the serial number {shown(serial_number)}")
        return found

    async def update(self, device_id: str, changes: DeviceChanges) -> DeviceRecord:
        """Change what is set in `changes`; raises NotFoundError, and RefusedError for what was decommissioned."""
        if not await self._change("d.device_id = %(wanted)s", {"wanted": device_id}, changes):
            kept = await self.get(device_id)
            if "status" in changes.model_fields_set and kept.status is not changes.status:
                raise RefusedError(
                    f"cannot make device {device_id} {changes.status}: it was decommissioned; "
                    f"'device release {kept.serial_number}' lifts that"
                )
        return await self.get(device_id)

    async def retire(self, device_id: str) -> DeviceRecord:
        """End a device's life in the registry: it stays readable, and no filter selects it unasked."""
        return await self.update(device_id, DeviceChanges(status=DeviceStatus.RETIRED))

    # --- many devices ------------------------------------------------------------------------------------------------

    async def update_many(self, devices: DeviceFilter, changes: DeviceChanges) -> int:
        """Change every device the filter selects, in one transaction; how many really changed."""
        clause, params = where(devices)
        return await self._change(clause, params, changes)

    async def find(
        self,
        devices: DeviceFilter,
        limit: int = 100,
        after: str | None = None,
        *,
        drifted: bool = False,
        offline: bool = False,
    ) -> DevicePage:
        """Devices the filter selects, in the order of their ids, and how many it selects in all.

        Args:
            limit: most devices to return.
            after: begin behind this id (the last one of the page before).
            drifted: only those that run another configuration than they should (domain.configurations.ConfigState).
            offline: only those that are silent beyond their limit (store/offline.py).
        """
        clause, params = where(devices)
        if offline:
            clause = f"{clause} AND EXISTS (SELECT FROM presence o WHERE o.device_id = d.device_id AND o.offline_since IS NOT NULL)"
        if drifted:
            clause = f"{clause} AND d.desired_config_version > 0 AND {CONFIG_STATE} = 'drifted'"
        async with (
            self._db.pool.connection() as connection,
            connection.cursor(row_factory=class_row(DeviceRecord)) as cursor,
        ):
            counted = await connection.execute(f"SELECT count(*) FROM devices d WHERE {clause}".encode(), params)
            total = await counted.fetchone()
            await cursor.execute(
                f"{_SELECT} WHERE {clause} AND (%(after)s::text IS NULL OR d.device_id > %(after)s::text)"
                " ORDER BY d.device_id LIMIT %(limit)s".encode(),
                {**params, "after": after, "limit": limit},
            )
            return DevicePage(total=total[0] if total else 0, devices=tuple(await cursor.fetchall()))

    async def count(self, devices: DeviceFilter) -> int:
        """How many devices the filter selects."""
        return (await self.find(devices, limit=0)).total

    async def iterate(self, devices: DeviceFilter) -> AsyncIterator[DeviceRecord]:
        """Every device the filter selects, in the order of their ids, a few thousand in memory at a time."""
        clause, params = where(devices)
        async with self._db.pool.connection() as connection:
            async with connection.cursor("devices", row_factory=class_row(DeviceRecord)) as cursor:
                cursor.itersize = _FETCHED_ROWS
                await cursor.execute(f"{_SELECT} WHERE {clause} ORDER BY d.device_id".encode(), params)
                async for device in cursor:
                    yield device

    # --- inside ------------------------------------------------------------------------------------------------------

    async def _one(self, condition: str, wanted: str) -> DeviceRecord | None:
        if "\0" in wanted:
            return None
        async with (
            self._db.pool.connection() as connection,
            connection.cursor(row_factory=class_row(DeviceRecord)) as cursor,
        ):
            await cursor.execute(f"{_SELECT} WHERE {condition}".encode(), {"wanted": wanted})
            return await cursor.fetchone()

    async def _change(self, clause: str, params: dict[str, Any], changes: DeviceChanges) -> int:
        values = {name: _bound(name, getattr(changes, name)) for name in changes.model_fields_set}
        if not values:
            return 0
        if "status" in values:
            retired = changes.status is DeviceStatus.RETIRED
            if not retired:
                clause = f"({clause}) AND {_NOT_BURIED}"
            values["retired_at"] = datetime.now(UTC) if retired else None
        compared = [name for name in values if name != "retired_at"]  # retiring what is retired changes nothing
        statement = sql.SQL(
            "UPDATE devices d SET updated_at = now(){version}, {sets} "
            "WHERE {clause} AND ({old}) IS DISTINCT FROM ({new})"
        ).format(
            version=sql.SQL(_NEXT_VERSION if changes.desired_config is not None else ""),
            sets=sql.SQL(", ").join(sql.SQL("{} = {}").format(sql.Identifier(n), _placeholder(n)) for n in values),
            clause=sql.SQL(clause),
            old=sql.SQL(", ").join(sql.Identifier("d", n) for n in compared),
            new=sql.SQL(", ").join(_placeholder(n) for n in compared),
        )
        new = {f"new_{name}": value for name, value in values.items()}
        try:
            async with self._db.pool.connection() as connection:
                cursor = await connection.execute(statement, {**params, **new})
                return cursor.rowcount
        except DataError as error:
            raise InvalidInputError(f"cannot change devices: {error}") from error


# --- the import's steps ----------------------------------------------------------------------------------------------


class _Mistakes:
    """The first mistakes of a file, and how many there are."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.first: list[Mistake] = []
        self.count = 0

    def add(self, mistake: Mistake) -> None:
        self.count += 1
        if len(self.first) < MISTAKES_SHOWN:
            self.first.append(mistake)

    def raise_if_any(self) -> None:
        if self.count:
            raise ImportRowError(self.source, self.first, self.count)


async def _copy(connection: AsyncConnection, rows: Iterable[DeviceRow | Mistake], mistakes: _Mistakes) -> int:
    """Stream the good rows into `incoming`; how many. After the first mistake rows are only checked."""
    copied = 0
    try:
        async with connection.cursor() as cursor, cursor.copy(_COPY_INCOMING) as copy:
            for row in rows:
                if isinstance(row, Mistake):
                    mistakes.add(row)
                elif not mistakes.count:
                    await copy.write_row(_incoming(row))
                    copied += 1
    except InvalidInputError as error:
        raise InvalidInputError(f"cannot import {mistakes.source}: {error}") from error
    return copied


def _incoming(row: DeviceRow) -> tuple[Any, ...]:
    device = row.record
    given = sum(_BIT[name] for name in row.given if name in _BIT)
    return (
        row.line, given,
        device.device_id, device.device_type, device.serial_number, device.manufacturer, device.site_id, device.zone,
        _text_of_json(device.tags), device.status.value, device.firmware_version, device.firmware_sha256,
        _text_of_json(device.config), _text_of_json(device.desired_config), device.config_version,
        _utc(device.retired_at), _utc(device.created_at), _utc(device.last_heartbeat), device.uptime,
    )  # fmt: skip


async def _refuse_taken_serials(connection: AsyncConnection, mistakes: _Mistakes) -> None:
    cursor = await connection.execute(_SERIALS_TAKEN)
    async for line, serial_number, owner in cursor:
        message = f"{shown(serial_number)} is the serial number of device {owner}, which is in the registry already"
        mistakes.add(Mistake("serial_number", message, line))
    mistakes.raise_if_any()


async def _refuse_return(connection: AsyncConnection, device: DeviceRecord) -> None:
    cursor = await connection.execute(
        "SELECT device_id, serial_number, retired_at FROM tombstones WHERE released_at IS NULL "
        "AND (serial_number = %s OR device_id = %s) LIMIT 1",
        (device.serial_number, device.device_id),
    )
    if (row := await cursor.fetchone()) is not None:
        raise ConflictError(f"cannot create device {device.device_id}: {buried_text(*row)}")


async def _refuse_buried(connection: AsyncConnection, mistakes: _Mistakes) -> None:
    if not (await (await connection.execute(_ANY_BURIED)).fetchone() or (False,))[0]:
        return
    cursor = await connection.execute(_BURIED.encode())
    async for line, device_id, retired, serial_number, at in cursor:
        what = "device_id" if device_id == retired else "serial_number"
        mistakes.add(Mistake(what, buried_text(retired, serial_number, at), line))
    mistakes.raise_if_any()


def buried_text(device_id: str, serial_number: str, at: datetime) -> str:
    """Why a serial number, or the id that had it, does not come back."""
    return (
        f"device {device_id} with the serial number {shown(serial_number)} was decommissioned at "
        f"{at:%Y-%m-%d %H:%M}Z and does not come back by itself; 'device release' lifts that"
    )


async def _merge(connection: AsyncConnection, source: str) -> tuple[int, int]:
    """From `incoming` into the registry: how many were created, how many updated.

    A gateway locks the same devices in another order now and then; PostgreSQL then ends one of the two transactions,
    and this one tries again from its savepoint.
    """
    for _ in range(_MERGE_TRIES - 1):
        with suppress(errors.DeadlockDetected):
            return await _merge_once(connection, source)
    return await _merge_once(connection, source)


async def _merge_once(connection: AsyncConnection, source: str) -> tuple[int, int]:
    """Rows are locked first, so that what the file does not speak of is read after everybody else's last change."""
    try:
        async with connection.transaction():
            await connection.execute(_LOCK_KNOWN)
            cursor = await connection.execute(_MERGE.encode())
            created, updated = await cursor.fetchone() or (0, 0)
            await connection.execute(_MERGE_PRESENCE)
    except errors.UniqueViolation as error:
        raise ConflictError(
            f"cannot import {source}: while it ran, another device got one of its serial numbers "
            f"({error.diag.message_detail}); import it again"
        ) from error
    return created, updated


# --- rows and records ------------------------------------------------------------------------------------------------


def _row_values(device: DeviceRecord) -> dict[str, Any]:
    values = {name: _bound(name, getattr(device, name)) for name in _COLUMNS}
    if device.status is DeviceStatus.RETIRED and device.retired_at is None:
        values["retired_at"] = datetime.now(UTC)
    if device.created_at is not None:
        values["created_at"] = _utc(device.created_at)
    if device.desired_config is not None:
        values["desired_config_version"] = device.config_version + 1
    return values


def _bound(name: str, value: Any) -> Any:
    if name in _JSON_COLUMNS and value is not None:
        return Jsonb(value)
    return _utc(value) if isinstance(value, datetime) else value


def _text_of_json(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value).decode()


def _utc(value: datetime | None) -> datetime | None:
    """Times without a zone are UTC."""
    return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


def _placeholder(name: str) -> sql.Placeholder:
    return sql.Placeholder(f"new_{name}")
