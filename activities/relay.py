"""The relay: from the outbox in PostgreSQL to the workflows that wait (store/waits.py).

A signal is deleted in the transaction that locked it, after Temporal has taken it. So a relay that is killed in between
delivers it again, and none is lost: handlers of `device_event` are idempotent. Several relays share the work, each with
rows of its own; signals of one workflow may then overtake each other, so handlers do not depend on their order either.

A workflow that does not run any more needs no signal: it is dropped, with a line in the log.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psycopg
import structlog
from prometheus_client import Counter
from psycopg import AsyncConnection
from psycopg_pool import PoolTimeout
from pydantic import ValidationError
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from models.identity import DeviceEvent
from observe.stopping import pause
from store.engine import Database
from store.listening import heard
from store.waits import CHANNEL

DELIVERED = Counter("tidegate_outbox_delivered_total", "Signals delivered to workflows.")
DROPPED = Counter("tidegate_outbox_dropped_total", "Signals to workflows that do not run any more.")

BATCH = 50
"""Signals under way at one time. The development server took 229 a second when tried."""

SIGNAL_TIMEOUT = timedelta(seconds=10)
RETRY_SECONDS = 1.0

_FOR_NOBODY = (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT)
"""The workflow does not run, or its id is none: no repetition will change that."""

log = structlog.get_logger("relay")

_TAKE = """
SELECT outbox_no, workflow_id, event FROM workflow_outbox ORDER BY attempts, outbox_no LIMIT %s FOR UPDATE SKIP LOCKED
"""
"""What has failed waits behind what has not been tried, so that signals nobody can deliver hold up no other."""


@dataclass
class OutboxRelay:
    """See the module. `signal`: the name under which every lifecycle workflow takes a DeviceEvent."""

    db: Database
    client: Client
    signal: str

    async def run(self, stop: asyncio.Event) -> None:
        """Deliver until `stop` is set, whatever is away for a while."""
        said = ""
        while not stop.is_set():
            try:
                async with await AsyncConnection.connect(self.db.url, autocommit=True) as listener:
                    await listener.execute(f"LISTEN {CHANNEL}".encode())
                    while not stop.is_set():
                        if not await self.deliver():
                            await heard(listener, stop)
                        said = ""
            except (psycopg.Error, PoolTimeout, RPCError) as error:
                if str(error) != said:
                    log.warning("cannot deliver signals, trying again", reason=str(error).strip()[:200])
                said = str(error)
                await pause(stop, RETRY_SECONDS)

    async def deliver(self) -> int:
        """Deliver some; how many are out of the outbox now. Raises RPCError where Temporal took not all of them."""
        async with self.db.pool.connection() as connection:
            rows = await (await connection.execute(_TAKE, (BATCH,))).fetchall()
            if not rows:
                return 0
            results = await asyncio.gather(*(self._send(row[1], row[2]) for row in rows), return_exceptions=True)
            taken = [row[0] for row, result in zip(rows, results, strict=True) if result is None]
            await self._forget(connection, taken)
            left = [row[0] for row in rows if row[0] not in taken]
            await connection.execute(
                "UPDATE workflow_outbox SET attempts = attempts + 1 WHERE outbox_no = ANY(%s)", (left,)
            )
        failed = [result for result in results if result is not None]
        if failed:
            raise failed[0]
        return len(taken)

    async def _forget(self, connection: AsyncConnection, taken: Sequence[int]) -> None:
        await connection.execute("DELETE FROM workflow_outbox WHERE outbox_no = ANY(%s)", (list(taken),))

    async def _send(self, workflow_id: str, event: dict[str, Any]) -> None:
        """Returns when Temporal has it, or when nobody will ever want it."""
        try:
            payload = DeviceEvent.model_validate(event)
            await self.client.get_workflow_handle(workflow_id).signal(self.signal, payload, rpc_timeout=SIGNAL_TIMEOUT)
            DELIVERED.inc()
        except RPCError as error:
            if error.status not in _FOR_NOBODY:
                raise
            DROPPED.inc()
            log.info(
                "dropped a signal", workflow=workflow_id, happening=payload.happening.value, reason=str(error)[:200]
            )
        except ValidationError as error:
            DROPPED.inc()
            log.error("dropped a signal that is no device event", workflow=workflow_id, reason=str(error)[:300])
