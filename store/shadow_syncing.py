"""Shadows as a workflow deals with them: want a state, see whether the device reports it, wait no longer.

Each method is one transaction and can be repeated. All hold the device's row, as whoever takes its reports does: a
report has either been seen here, or finds the wait.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from psycopg import AsyncConnection

from domain.shadow import Document
from domain.shadow_messages import Message, announce, delta_message
from domain.shadow_waiting import still_missing, unconfirmed
from domain.standing import why_not_want
from models.identity import DeviceHappening
from models.shadow import CheckShadowInput, EndShadowInput, ShadowSeen, WantShadowInput
from store.engine import Database
from store.lifecycle import refuse, standing
from store.shadows import load_shadows, set_desired, was_set
from store.waits import expect, forget


@dataclass
class ShadowSyncStore:
    """See the module. `db` must be open."""

    db: Database

    async def want(self, asked: WantShadowInput) -> tuple[ShadowSeen, list[Message]]:
        """Write what is wanted, once for each mark, and wait; what is to be published once that is committed.

        Raises NotFoundError, RefusedError, ConflictError, InvalidInputError.
        """
        async with self.db.pool.connection() as connection:
            refuse(why_not_want(await standing(connection, asked.device_id, lock=True)))
            if await was_set(connection, asked.device_id, asked.mark):
                document = await _document(connection, asked.device_id, asked.shadow)
                reminder = delta_message(asked.device_id, asked.shadow, document, datetime.now(UTC).timestamp())
                messages = [reminder] if reminder else []
            else:
                update = await set_desired(
                    connection,
                    asked.device_id,
                    asked.shadow,
                    asked.patch,
                    asked.actor,
                    asked.expected_version,
                    asked.reason,
                    asked.mark,
                )
                document = update.after
                messages = announce(asked.device_id, asked.shadow, update.before, update.after, update.patch, update.at)
            return await _look(connection, asked, document), messages

    async def check(self, asked: CheckShadowInput) -> tuple[ShadowSeen, list[Message]]:
        """Whether the device has reported it; where not, wait on. Raises RefusedError for one that is not heard."""
        async with self.db.pool.connection() as connection:
            refused = why_not_want(await standing(connection, asked.device_id, lock=True))
            if refused is not None:
                await forget(connection, asked.workflow_id)
            else:
                document = await _document(connection, asked.device_id, asked.shadow)
                seen = await _look(connection, asked, document)
        refuse(refused)
        reminder = None
        if asked.remind and not seen.confirmed:
            reminder = delta_message(asked.device_id, asked.shadow, document, datetime.now(UTC).timestamp())
        return seen, [reminder] if reminder else []

    async def end(self, asked: EndShadowInput) -> ShadowSeen:
        """Wait no longer; whether the device reports it after all, and if not, why a person may think."""
        async with self.db.pool.connection() as connection:
            await standing(connection, asked.device_id, lock=True)
            await forget(connection, asked.workflow_id)
            document = await _document(connection, asked.device_id, asked.shadow)
            differs = still_missing(asked.patch, document)
            cursor = await connection.execute(
                "SELECT last_heartbeat, offline_since FROM presence WHERE device_id = %s", (asked.device_id,)
            )
            last_heard, offline_since = await cursor.fetchone() or (None, None)
            now = datetime.now(UTC)
            reason = unconfirmed(asked.device_id, asked.patch, document, asked.limit, now, last_heard, offline_since)
            return ShadowSeen(
                version=document.version,
                confirmed=not differs,
                differs=differs,
                reason=reason if differs else "",
                last_heard=last_heard,
                offline_since=offline_since,
            )


async def _document(connection: AsyncConnection, device_id: str, shadow: str) -> Document:
    loaded = await load_shadows(connection, [(device_id, shadow)], lock=False)
    return loaded[device_id, shadow].document


async def _look(
    connection: AsyncConnection, asked: WantShadowInput | CheckShadowInput, document: Document
) -> ShadowSeen:
    """What the document says of the patch; where something is missing, the wait is written in this transaction."""
    differs = still_missing(asked.patch, document)
    if differs:
        await expect(connection, asked.device_id, asked.workflow_id, {DeviceHappening.SHADOW_REPORTED: None})
    else:
        await forget(connection, asked.workflow_id)
    return ShadowSeen(version=document.version, confirmed=not differs, differs=differs)
