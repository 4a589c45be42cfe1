"""The connection to PostgreSQL: one pool for the hot path, one SQLModel session factory, and the migrations.

```python
db = Database(url)
await db.open()
async with db.pool.connection() as connection: ...
```
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import psycopg
import psycopg.types.json
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from models.errors import NotFoundError, UnavailableError

psycopg.types.json.set_json_loads(orjson.loads)

if TYPE_CHECKING:  # SQLAlchemy and Alembic are half of what a command costs to start; few need them
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

MIGRATIONS = Path(__file__).parent.parent / "migrations"


def sqlalchemy_url(url: str) -> str:
    """The same address for SQLAlchemy with psycopg 3: `postgresql://` becomes `postgresql+psycopg://`."""
    return url.replace("postgresql://", "postgresql+psycopg://", 1)


def migrate(url: str, revision: str = "head") -> None:
    """Bring the schema of the database at `url` to `revision`. Runs twice without harm; synchronous."""
    import alembic.command
    import alembic.config

    config = alembic.config.Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = sqlalchemy_url(url)
    alembic.command.upgrade(config, revision)


class Database:
    """Pools to one PostgreSQL. `pool` commits or rolls back when its connection block ends."""

    def __init__(self, url: str, *, min_size: int = 1, max_size: int = 10) -> None:
        self.url = url
        self.pool: AsyncConnectionPool[AsyncConnection] = AsyncConnectionPool(
            url, min_size=min_size, max_size=max_size, open=False, check=AsyncConnectionPool.check_connection
        )
        self._engine: AsyncEngine | None = None

    async def open(self, timeout: float = 10.0) -> None:
        """Connect. Raises UnavailableError naming the address (without password) when nobody answers."""
        try:
            await self.pool.open(wait=True, timeout=timeout)
        except PoolTimeout as error:
            await self.pool.close()
            info = psycopg.conninfo.conninfo_to_dict(self.url)
            raise UnavailableError(
                f"cannot connect to PostgreSQL at {info.get('host')}:{info.get('port')}/{info.get('dbname')} within "
                f"{timeout:.0f} s; start the stack with 'starter.py up', or check TIDEGATE_DATABASE_URL"
            ) from error

    @property
    def sessions(self) -> "async_sessionmaker[AsyncSession]":
        """Sessions of SQLAlchemy for registry queries; the engine is made on first use."""
        from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

        if self._engine is None:
            self._engine = create_async_engine(sqlalchemy_url(self.url), pool_pre_ping=True)
        return async_sessionmaker(self._engine, expire_on_commit=False)

    async def close(self) -> None:
        """Close every connection."""
        await self.pool.close()
        if self._engine is not None:
            await self._engine.dispose()


async def fetch_one(connection: AsyncConnection, sql: str, arguments: Any) -> tuple[Any, ...]:
    """The one row that a statement returns. Raises NotFoundError when there is none."""
    row = await (await connection.execute(sql, arguments)).fetchone()
    if row is None:
        raise NotFoundError(f"expected one row, got none: {sql[:60]}")
    return row
