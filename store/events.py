"""A job's record: what happened to it, when, why and by whom. Append-only."""

from psycopg import AsyncConnection


async def append_event(
    connection: AsyncConnection, job_no: int, kind: str, text: str, wave: int | None = None, actor: str = "tidegate"
) -> None:
    """Add a line, in the transaction that does what it says."""
    await connection.execute(
        "INSERT INTO job_events (job_no, kind, wave, actor, text) VALUES (%s, %s, %s, %s, %s)",
        (job_no, kind, wave, actor, text),
    )
