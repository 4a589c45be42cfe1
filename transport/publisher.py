"""Publishing to devices from activities: notifications, which are only hints."""

import uuid

from models.settings import Settings
from transport.connection import Connection


class Publisher:
    """A connection that only publishes, at QoS 0."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @classmethod
    async def connect(cls, settings: Settings) -> "Publisher":
        """Connect under a client id of its own. Raises UnavailableError."""
        connection = Connection(f"engine@worker-{uuid.uuid4().hex[:12]}")
        await connection.open(settings)
        return cls(connection)

    async def publish(self, topic: str, payload: bytes) -> None:
        """Send a hint; it is dropped while the link is down."""
        self._connection.publish(topic, payload)

    async def close(self) -> None:
        """Disconnect."""
        await self._connection.close()
