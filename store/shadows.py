"""Shadows in PostgreSQL: loaded and locked for a whole batch, changed in memory, saved at once with their history.

Whoever changes a shadow holds its device's row first: it is there also where the shadow is not yet, and decommissioning
takes it, too. What an update means is domain/shadow.py's.

```python
change = await set_desired(connection, "motor-7", "", {"power": "on"}, "alice")
```
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson
from psycopg import AsyncConnection

from domain.shadow import KEPT_HOURS, MAX_SHADOWS, RECENT_UPDATES, Document, ShadowRefusedError
from domain.standing import why_not_want
from models.errors import ConflictError, InvalidInputError, NotFoundError
from models.identity import DeviceHappening
from models.protocol import CONFIG_SHADOW
from store.audit import append_audit
from store.lifecycle import refuse, standing
from store.waits import happened

_LOCK = """
SELECT FROM devices WHERE device_id = ANY(ARRAY(SELECT jsonb_array_elements_text(%s::jsonb)))
ORDER BY device_id FOR NO KEY UPDATE
"""

_LOAD = f"""
SELECT k.device_id, k.name, s.desired, s.reported, s.desired_metadata, s.reported_metadata,
       CASE WHEN s.deleted_at < now() - interval '{KEPT_HOURS} hours' THEN 0 ELSE s.version END,
       s.recent, s.device_id IS NOT NULL AND s.deleted_at IS NULL,
       EXISTS (SELECT FROM device_waits w WHERE w.device_id = k.device_id AND w.event = 'shadow-reported'),
       CASE WHEN s.device_id IS NULL THEN (SELECT count(*) FROM shadows o WHERE o.device_id = k.device_id) END
FROM jsonb_to_recordset(%s::jsonb) AS k(device_id text, name text)
JOIN devices d ON d.device_id = k.device_id LEFT JOIN shadows s ON s.device_id = k.device_id AND s.name = k.name
"""

_SAVE = """
INSERT INTO shadows AS s (device_id, name, desired, reported, desired_metadata, reported_metadata, version, recent,
                          updated_at, deleted_at)
SELECT n.device_id, n.name, n.desired, n.reported, n.desired_metadata, n.reported_metadata, n.version, n.recent,
       to_timestamp(n.at), CASE WHEN n.deleted THEN to_timestamp(n.at) END
FROM jsonb_to_recordset(%s::jsonb)
  AS n(device_id text, name text, desired jsonb, reported jsonb, desired_metadata jsonb, reported_metadata jsonb,
       version bigint, recent text[], at float8, deleted boolean)
ON CONFLICT (device_id, name) DO UPDATE SET
  desired = excluded.desired, reported = excluded.reported, desired_metadata = excluded.desired_metadata,
  reported_metadata = excluded.reported_metadata, version = excluded.version, recent = excluded.recent,
  updated_at = excluded.updated_at, deleted_at = excluded.deleted_at
"""

_REMEMBER = """
INSERT INTO shadow_history (device_id, name, version, at, actor, change)
SELECT device_id, name, version, to_timestamp(at), actor, change
FROM jsonb_to_recordset(%s::jsonb)
  AS n(device_id text, name text, version bigint, at float8, actor text, change jsonb)
"""

_HISTORY = """
SELECT version, at, actor, change FROM shadow_history WHERE device_id = %s AND name = %s
ORDER BY at DESC, version DESC LIMIT %s
"""

_LIST = """
SELECT name, version, updated_at, desired, reported FROM shadows WHERE device_id = %s AND deleted_at IS NULL
ORDER BY name
"""

_CLEAR = """
WITH gone AS (DELETE FROM shadows WHERE device_id = %s RETURNING deleted_at)
SELECT count(*) FROM gone WHERE deleted_at IS NULL
"""


@dataclass(slots=True)
class Room:
    """How many shadows more a device may have; those of a batch share it."""

    left: int


@dataclass(slots=True)
class LoadedShadow:
    """A shadow at hand, and what has been done to it since."""

    device_id: str
    name: str
    document: Document
    recent: list[str] = field(default_factory=list)
    awaited: bool = False
    """Whether some workflow waits for a report of this device."""
    reported: bool = False
    room: Room | None = None
    """Of one that has never been."""
    changes: list[tuple[int, str, Mapping[str, Any] | None]] = field(default_factory=list)
    """(version, actor, the state that was sent; None for a deletion)"""

    def update(
        self,
        patch: Mapping[str, Any],
        now: float,
        actor: str,
        expected_version: int | None = None,
        digest: str | None = None,
        *,
        again: bool = False,
    ) -> None:
        """Accept an update. Raises ShadowRefusedError; then nothing has changed.

        Args:
            again: it may have been applied before; then what followed it comes again behind it, and is to be applied, too.
        """
        if self.room is not None and self.room.left <= 0:
            raise ShadowRefusedError(
                400,
                f"Too many shadows: a device may have {MAX_SHADOWS}, those deleted lately included; delete one, or wait",
            )
        self.document = self.document.updated(patch, now, expected_version)
        if self.room is not None:
            self.room.left, self.room = self.room.left - 1, None
        self.changes.append((self.document.version, actor, patch))
        self.reported = self.reported or "reported" in patch
        before = [] if again else self.recent
        self.recent = before if digest is None else [*before, digest][-RECENT_UPDATES:]

    def delete(self, actor: str, expected_version: int | None = None) -> None:
        """Delete it. Raises ShadowRefusedError; then nothing has changed."""
        self.document = self.document.deleted(expected_version)
        self.changes.append((self.document.version, actor, None))


@dataclass(frozen=True, slots=True)
class ShadowUpdate:
    """What an update did, for whoever announces it (domain.shadow_messages.announce). `at`: epoch seconds."""

    before: Document
    after: Document
    patch: Mapping[str, Any]
    at: float


@dataclass(frozen=True, slots=True)
class ShadowEntry:
    """A line of a shadow's history; `change` None: it was deleted."""

    version: int
    at: datetime
    actor: str
    change: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class ShadowLine:
    """A shadow of a device as it is listed."""

    name: str
    version: int
    updated_at: datetime
    desired: dict[str, Any] | None
    reported: dict[str, Any] | None


Key = tuple[str, str]


async def load_shadows(
    connection: AsyncConnection, keys: Iterable[Key], *, lock: bool = True
) -> dict[Key, LoadedShadow]:
    """These shadows; with `lock` their devices' rows are held. One of a device that is not in the registry is missing.

    Two statements, because one would read shadows as they were before it waited for the lock.
    """
    wanted = sorted(keys)
    if lock:
        await connection.execute(_LOCK, (orjson.dumps(sorted({device for device, _ in wanted})).decode(),))
    asked = orjson.dumps([{"device_id": device, "name": name} for device, name in wanted]).decode()
    found: dict[Key, LoadedShadow] = {}
    rooms: dict[str, Room] = {}
    for row in await (await connection.execute(_LOAD, (asked,))).fetchall():
        (
            device,
            name,
            desired,
            reported,
            desired_metadata,
            reported_metadata,
            version,
            recent,
            exists,
            awaited,
            others,
        ) = row
        document = Document(desired, reported, desired_metadata, reported_metadata, version or 0, exists)
        found[device, name] = LoadedShadow(device, name, document, recent or [], awaited)
        if others is not None:
            found[device, name].room = rooms.setdefault(device, Room(MAX_SHADOWS - others))
    return found


async def save_shadows(connection: AsyncConnection, shadows: Iterable[LoadedShadow], now: float) -> None:
    """Write what has changed, with its history, and tell the workflows that wait for a report."""
    changed = [shadow for shadow in shadows if shadow.changes]
    if not changed:
        return
    await connection.execute(_SAVE, (orjson.dumps([_row(shadow, now) for shadow in changed]).decode(),))
    history: list[dict[str, Any]] = [
        {"device_id": s.device_id, "name": s.name, "version": version, "actor": actor, "change": change}
        for s in changed
        for version, actor, change in s.changes
    ]
    for number, line in enumerate(history):
        line["at"] = now + number * 2e-6  # apart: a deletion has the version of the update before it
    await connection.execute(_REMEMBER, (orjson.dumps(history).decode(),))
    await happened(
        connection,
        [
            (s.device_id, DeviceHappening.SHADOW_REPORTED, {"shadow": s.name, "version": s.document.version})
            for s in changed
            if s.awaited and s.reported
        ],
    )


def _row(shadow: LoadedShadow, now: float) -> dict[str, Any]:
    document = shadow.document
    return {
        "device_id": shadow.device_id,
        "name": shadow.name,
        "desired": document.desired,
        "reported": document.reported,
        "desired_metadata": document.desired_metadata,
        "reported_metadata": document.reported_metadata,
        "version": document.version,
        "recent": shadow.recent,
        "at": now,
        "deleted": not document.exists,
    }


async def set_desired(
    connection: AsyncConnection,
    device_id: str,
    name: str,
    patch: Mapping[str, Any] | None,
    actor: str,
    expected_version: int | None = None,
    reason: str = "",
    mark: str = "",
) -> ShadowUpdate:
    """Merge a patch into what is wanted of a device; None drops all that is wanted.

    Args:
        mark: noted in the audit, so that whoever repeats it finds it there (`was_set`).

    Raises NotFoundError, RefusedError (retired, barred), ConflictError (another version), InvalidInputError (limits, or
    a shadow that is the server's own).
    """
    _check_name(device_id, name)
    refuse(why_not_want(await standing(connection, device_id, lock=True)))
    shadow, now = await _at_hand(connection, device_id, name)
    before, whole = shadow.document, {"desired": patch}
    try:
        shadow.update(whole, now, actor, expected_version)
    except ShadowRefusedError as refused:
        raise _as_error(device_id, name, before, expected_version, refused) from refused
    await save_shadows(connection, [shadow], now)
    details = {"shadow": name, "version": shadow.document.version, **({"mark": mark} if mark else {})}
    await append_audit(connection, actor, "shadow.wanted", "device", device_id, reason, details)
    return ShadowUpdate(before, shadow.document, whole, now)


async def was_set(connection: AsyncConnection, device_id: str, mark: str) -> bool:
    """Whether a patch with this mark has been written."""
    cursor = await connection.execute(
        "SELECT EXISTS (SELECT FROM audit_events WHERE subject_kind = 'device' AND subject = %s "
        "AND action = 'shadow.wanted' AND details->>'mark' = %s)",
        (device_id, mark),
    )
    row = await cursor.fetchone()
    return row is not None and bool(row[0])


async def delete_shadow(
    connection: AsyncConnection, device_id: str, name: str, actor: str, expected_version: int | None = None
) -> ShadowUpdate:
    """Delete a shadow; its version goes on for two days. Raises NotFoundError, ConflictError, InvalidInputError."""
    _check_name(device_id, name)
    await standing(connection, device_id, lock=True)
    shadow, now = await _at_hand(connection, device_id, name)
    before = shadow.document
    if not before.exists:
        raise NotFoundError(
            f"cannot delete {_named(device_id, name)}: there is none; 'shadow list' shows those there are"
        )
    try:
        shadow.delete(actor, expected_version)
    except ShadowRefusedError as refused:
        raise _as_error(device_id, name, before, expected_version, refused) from refused
    await save_shadows(connection, [shadow], now)
    details = {"shadow": name, "version": before.version}
    await append_audit(connection, actor, "shadow.deleted", "device", device_id, "", details)
    return ShadowUpdate(before, shadow.document, {}, now)


async def get_shadow(connection: AsyncConnection, device_id: str, name: str) -> Document:
    """A shadow's document. Raises NotFoundError where the device or the shadow is not there."""
    found = (await load_shadows(connection, [(device_id, name)], lock=False)).get((device_id, name))
    if found is None:
        raise NotFoundError(f"no device with the id {device_id!r}; 'device list' shows those there are")
    if not found.document.exists:
        raise NotFoundError(f"there is no {_named(device_id, name)}; 'shadow list {device_id}' shows those there are")
    return found.document


async def shadow_history(connection: AsyncConnection, device_id: str, name: str, limit: int = 20) -> list[ShadowEntry]:
    """What was accepted for a shadow, the newest first."""
    cursor = await connection.execute(_HISTORY, (device_id, name, limit))
    return [ShadowEntry(*row) for row in await cursor.fetchall()]


async def list_shadows(connection: AsyncConnection, device_id: str) -> list[ShadowLine]:
    """A device's shadows, but for that of its configuration."""
    cursor = await connection.execute(_LIST, (device_id,))
    return [ShadowLine(*row) for row in await cursor.fetchall()]


async def clear_shadows(connection: AsyncConnection, device_id: str) -> int:
    """Forget a device's shadows, versions included; how many there were. Their history stays as long as any."""
    row = await (await connection.execute(_CLEAR, (device_id,))).fetchone()
    return int(row[0]) if row else 0


async def _at_hand(connection: AsyncConnection, device_id: str, name: str) -> tuple[LoadedShadow, float]:
    shadows = await load_shadows(connection, [(device_id, name)])
    row = await (await connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8")).fetchone()
    assert row is not None
    return shadows[device_id, name], row[0]


def _check_name(device_id: str, name: str) -> None:
    if name == CONFIG_SHADOW:
        raise InvalidInputError(
            f"cannot change the shadow config of {device_id}: it is its configuration; use 'device configure'"
        )


def _named(device_id: str, name: str) -> str:
    return f"shadow {name} of {device_id}" if name else f"shadow of {device_id}"


def _as_error(
    device_id: str, name: str, before: Document, expected: int | None, refused: ShadowRefusedError
) -> ConflictError | InvalidInputError:
    if refused.code == 409:
        return ConflictError(
            f"cannot change the {_named(device_id, name)}: expected version {expected}, it is {before.version}; "
            "look at it again with 'shadow get'"
        )
    return InvalidInputError(f"cannot change the {_named(device_id, name)}: {refused}")
