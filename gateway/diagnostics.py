"""What devices answer to diagnostic requests."""

from collections.abc import Sequence

from psycopg import AsyncConnection

from gateway.requests import Request


async def take_diagnostics(connection: AsyncConnection, requests: Sequence[Request]) -> None:
    """Keep the answers, and tell the workflows that wait for them."""
