"""Devices with certificates in a real database, and what they do: the gateway's and the enrolment server's writes."""

import hashlib
from datetime import timedelta
from typing import Any

from psycopg.rows import dict_row

from models.identity import DeviceHappening
from models.protocol import CommandStatus
from store.commands import CommandAnswer, answer_commands, pending_commands
from store.configurations import report
from store.engine import Database
from store.waits import happened

LIFE = timedelta(days=90)


async def add_authority(db: Database, name: str = "ca-1", state: str = "active") -> str:
    """A device CA, as far as rotation looks at it."""
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO authorities (authority_id, kind, name, certificate, key_reference, state, not_before, "
            "not_after) VALUES (%s, 'device', %s, '', 'file:x', %s, now(), now() + interval '10 years')",
            (name, name, state),
        )
    return name


async def add_certificate(
    db: Database,
    device_id: str,
    generation: int = 1,
    *,
    authority: str = "ca-1",
    life: timedelta = LIFE,
    age: timedelta = timedelta(0),
    confirmed: bool = True,
    tell: bool = False,
) -> str:
    """A certificate that was issued `age` ago; with `tell`, whoever waits for one is told in the same transaction."""
    name = f"{device_id}/{generation}"
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO certificates (certificate_id, device_id, authority_id, generation, serial_hex, spki_sha256, "
            "pem, not_before, not_after, state, issued_at, confirmed_at) VALUES (%(name)s, %(device)s, %(ca)s, %(g)s, "
            "%(hash)s, %(hash)s, '', now() - %(age)s, now() - %(age)s + %(life)s, 'valid', now() - %(age)s, "
            "CASE WHEN %(confirmed)s THEN now() END)",
            {
                "name": name,
                "device": device_id,
                "ca": authority,
                "g": generation,
                "hash": hashlib.sha256(name.encode()).hexdigest(),
                "age": age,
                "life": life,
                "confirmed": confirmed,
            },
        )
        if tell:
            detail = {"certificate_id": name}
            await happened(connection, [(device_id, DeviceHappening.CERTIFICATE_ISSUED, detail)])
    return name


async def confirm(db: Database, device_id: str, certificate_id: str) -> None:
    """The device has connected with it."""
    async with db.pool.connection() as connection:
        await connection.execute(
            "UPDATE certificates SET confirmed_at = now() WHERE certificate_id = %s AND state = 'valid'",
            (certificate_id,),
        )
        detail = {"certificate_id": certificate_id}
        await happened(connection, [(device_id, DeviceHappening.CERTIFICATE_CONFIRMED, detail)])


async def report_configuration(
    db: Database, device_id: str, version: int, config: dict[str, Any] | None = None
) -> None:
    """The device says what it runs."""
    async with db.pool.connection() as connection:
        await report(connection, device_id, version, config)


async def answer(db: Database, device_id: str, status: CommandStatus = CommandStatus.SUCCEEDED) -> str | None:
    """The device asks for its command and answers it; the operation, or None: there was none."""
    async with db.pool.connection() as connection:
        pending = (await pending_commands(connection, [device_id])).get(device_id)
        if pending is None:
            return None
        for over in await answer_commands(connection, [CommandAnswer(device_id, pending.request_id, status)]):
            detail = {"request_id": over.request_id, "status": over.status.value, "reason": over.reason}
            await happened(connection, [(device_id, DeviceHappening.COMMAND_ANSWERED, detail)])
        return pending.operation


async def rows(db: Database, sql: str, *arguments: object) -> list[dict[str, Any]]:
    """What a query finds."""
    async with db.pool.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(sql.encode(), arguments)
        return await cursor.fetchall()


async def one(db: Database, sql: str, *arguments: object) -> dict[str, Any]:
    """The one row that a query finds."""
    [found] = await rows(db, sql, *arguments)
    return found


async def audit_of(db: Database, subject: str) -> list[str]:
    """What was done to a device or serial number, in order."""
    found = await rows(db, "SELECT action FROM audit_events WHERE subject = %s ORDER BY event_no", subject)
    return [row["action"] for row in found]


async def alerts(db: Database) -> dict[str, str]:
    """Alerts that stand: rule to subject."""
    return {row["rule"]: row["subject"] for row in await rows(db, "SELECT * FROM alerts WHERE state <> 'resolved'")}


async def waits(db: Database) -> list[tuple[str, str]]:
    """(workflow, event) that is waited for."""
    found = await rows(db, "SELECT workflow_id, event FROM device_waits ORDER BY workflow_id, event")
    return [(row["workflow_id"], row["event"]) for row in found]
