"""What is kept for some days and is no table of days: it is deleted in pieces, so that nobody waits for long."""

from datetime import timedelta

from psycopg import sql

from domain.shadow import KEPT_HOURS
from store.engine import Database
from store.partitions import delete_in_pieces

AT_ONCE = 2000

_OLD = {
    "quarantine": "at < now() - {age}",
    "alert_notifications": "handed_over_at < now() - {age}",
    "diagnostics": "state <> 'requested' AND COALESCE(answered_at, expires_at) < now() - {age}",
    "shadows": f"deleted_at < now() - interval '{KEPT_HOURS} hours'",
}
"""Conditions by table. What is decided and done (audit, jobs, executions and their events, alerts) is not among them."""


async def delete_old(db: Database, age: timedelta) -> dict[str, int]:
    """Delete what is older; the number of rows by table, of those where there were any."""
    deleted = {}
    for table, condition in _OLD.items():
        name = sql.Identifier(table)
        statement = sql.SQL(
            "DELETE FROM {name} WHERE ctid IN (SELECT ctid FROM {name} WHERE {old} LIMIT {limit})"
        ).format(name=name, old=sql.SQL(condition).format(age=sql.Literal(age)), limit=sql.Literal(AT_ONCE))
        if count := await delete_in_pieces(db, statement, AT_ONCE):
            deleted[table] = count
    return deleted
