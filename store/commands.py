"""Commands to devices about their identity: opening, handing out, answering. Signing them is the gateway's.

A device has at most one open command of each operation; the index `device_commands_one_open` sees to it. Whoever opens
one and waits for the answer calls `waits.expect(... COMMAND_ANSWERED ...)` in the same transaction.

```python
request_id = await open_command(connection, "motor-7", Operation.ROTATE_CERTIFICATE, "alice", expires_at)
```
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson
from psycopg import AsyncConnection
from psycopg.rows import class_row

from models.errors import InvalidInputError, NotFoundError
from models.identity import CommandView
from models.protocol import CommandStatus, Operation

CLOSED = ("expired", "canceled")
"""What `close_command` may make of an open command."""

_EXPIRE = """
UPDATE device_commands SET state = 'expired', answered_at = now(), answer = 'expired before the device answered'
WHERE device_id = %s AND operation = %s AND state IN ('pending','accepted') AND expires_at <= now()
"""

_OPEN = """
INSERT INTO device_commands AS c (request_id, device_id, operation, state, requested_by, expires_at)
SELECT %s, device_id, %s, 'pending', %s, %s FROM devices WHERE device_id = %s
ON CONFLICT (device_id, operation) WHERE state IN ('pending','accepted')
DO UPDATE SET expires_at = GREATEST(c.expires_at, excluded.expires_at)
RETURNING request_id
"""

_PENDING = """
SELECT DISTINCT ON (c.device_id) c.device_id, c.request_id, c.operation, extract(epoch FROM c.expires_at)::float8
FROM jsonb_array_elements_text(%s::jsonb) AS t(device_id)
JOIN device_commands c USING (device_id)
WHERE c.state IN ('pending','accepted') AND c.expires_at > now()
ORDER BY c.device_id, c.created_at, c.request_id
"""

_ANSWER = """
UPDATE device_commands c SET state = n.status, answer = n.reason,
       answered_at = CASE WHEN n.status = 'accepted' THEN c.answered_at ELSE now() END
FROM jsonb_to_recordset(%s::jsonb) AS n(device_id text, request_id text, status text, reason text)
WHERE c.request_id = n.request_id AND c.device_id = n.device_id
  AND (c.state = 'pending' OR c.state = 'accepted' AND n.status <> 'accepted')
RETURNING c.request_id
"""

_SHOW = """
SELECT request_id, device_id, operation, state, requested_by, created_at, expires_at, answered_at, answer
FROM device_commands
"""


@dataclass(frozen=True, slots=True)
class PendingCommand:
    """A command that a device may have now; `expires_at` in epoch seconds."""

    device_id: str
    request_id: str
    operation: str
    expires_at: float


@dataclass(frozen=True, slots=True)
class CommandAnswer:
    """What a device says to a command."""

    device_id: str
    request_id: str
    status: CommandStatus
    reason: str = ""

    @property
    def is_final(self) -> bool:
        """Whether nothing more will come."""
        return self.status is not CommandStatus.ACCEPTED


async def open_command(
    connection: AsyncConnection, device_id: str, operation: Operation, actor: str, expires_at: datetime
) -> str:
    """Tell a device to do something, until `expires_at`; the request id.

    Idempotent: while one of this operation is open, that one is returned, and it lasts at least until `expires_at`.
    Raises NotFoundError for a device that is not in the registry.
    """
    await connection.execute(_EXPIRE, (device_id, operation.value))
    arguments = (secrets.token_hex(16), operation.value, actor, expires_at, device_id)
    row = await (await connection.execute(_OPEN, arguments)).fetchone()
    if row is None:
        raise NotFoundError(f"cannot command {device_id} to {operation.value}: no device has this id")
    return str(row[0])


async def close_command(
    connection: AsyncConnection, request_id: str, state: str = "canceled", reason: str = ""
) -> bool:
    """Hand it out no more. Returns False where it had ended already; what it ended with stays."""
    if state not in CLOSED:
        raise InvalidInputError(f"cannot close a command as {state!r}, expected one of {', '.join(CLOSED)}")
    cursor = await connection.execute(
        "UPDATE device_commands SET state = %s, answer = %s, answered_at = now() "
        "WHERE request_id = %s AND state IN ('pending','accepted')",
        (state, reason, request_id),
    )
    return bool(cursor.rowcount)


async def pending_commands(connection: AsyncConnection, device_ids: Sequence[str]) -> dict[str, PendingCommand]:
    """The oldest open command of each of these devices that has one."""
    cursor = await connection.execute(_PENDING, (orjson.dumps(list(device_ids)).decode(),))
    return {row[0]: PendingCommand(*row) for row in await cursor.fetchall()}


async def answer_commands(connection: AsyncConnection, answers: Sequence[CommandAnswer]) -> list[CommandAnswer]:
    """Record what devices answer; those answers that ended a command just now.

    An answer counts only from the device that was asked, and only while the command is open: what has ended stays.
    """
    over: list[CommandAnswer] = []
    for group in _one_per_request(answers):
        rows: list[Mapping[str, Any]] = [
            {"device_id": a.device_id, "request_id": a.request_id, "status": a.status.value, "reason": a.reason}
            for a in group
        ]
        cursor = await connection.execute(_ANSWER, (orjson.dumps(rows).decode(),))
        changed = {row[0] for row in await cursor.fetchall()}
        over += [answer for answer in group if answer.request_id in changed and answer.is_final]
    return over


def _one_per_request(answers: Sequence[CommandAnswer]) -> list[list[CommandAnswer]]:
    """In order, split where a request comes again: an UPDATE uses one row of several, whichever it likes."""
    groups: list[list[CommandAnswer]] = []
    seen: set[str] = set()
    for answer in answers:
        if not groups or answer.request_id in seen:
            groups.append([])
            seen = set()
        groups[-1].append(answer)
        seen.add(answer.request_id)
    return groups


async def get_command(connection: AsyncConnection, request_id: str) -> CommandView:
    """One command; raises NotFoundError."""
    async with connection.cursor(row_factory=class_row(CommandView)) as cursor:
        await cursor.execute(f"{_SHOW} WHERE request_id = %s".encode(), (request_id,))
        if (found := await cursor.fetchone()) is None:
            raise NotFoundError(f"no command has the request id {request_id}")
        return found


async def list_commands(connection: AsyncConnection, device_id: str, limit: int = 20) -> list[CommandView]:
    """A device's commands, the newest first."""
    async with connection.cursor(row_factory=class_row(CommandView)) as cursor:
        await cursor.execute(
            f"{_SHOW} WHERE device_id = %s ORDER BY created_at DESC, request_id LIMIT %s".encode(), (device_id, limit)
        )
        return await cursor.fetchall()
