"""Since when the engine has heard without a gap: the one row that the gateway's pulse keeps."""

from psycopg import AsyncConnection

from domain.presence import Coverage

SOURCE = "gateway"


async def read_coverage(connection: AsyncConnection) -> Coverage | None:
    """What the last pulse said; None where none has ever come."""
    cursor = await connection.execute("SELECT covered_since, pulsed_at FROM ingest_state WHERE source = %s", (SOURCE,))
    row = await cursor.fetchone()
    return None if row is None else Coverage(*row)


async def save_coverage(connection: AsyncConnection, coverage: Coverage) -> None:
    """Keep what a pulse has said."""
    await connection.execute(
        "INSERT INTO ingest_state (source, covered_since, pulsed_at) VALUES (%s, %s, %s) "
        "ON CONFLICT (source) DO UPDATE SET covered_since = excluded.covered_since, pulsed_at = excluded.pulsed_at",
        (SOURCE, coverage.since, coverage.pulsed_at),
    )
