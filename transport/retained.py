"""Clearing what a broker keeps: retained messages, which outlive whoever sent them and reach whoever comes next.

A broker sends them right after the subscription, marked as retained; an empty retained message in their place removes
them. What was removed is looked for again on a new connection, until nothing is found.
"""

import asyncio
import uuid
from collections.abc import Sequence

from models.errors import UnavailableError
from models.settings import Settings
from transport.connection import Connection

QUIET_SECONDS = 1.0
"""Retained messages come within milliseconds of the SUBACK; so long nothing more has come, all have."""

MOST_SECONDS = 10.0
PASS_SECONDS = 30.0
"""One pass with its connection; longer than all that it waits for."""

PASSES = 5
"""Each clears what it finds; the last one finds nothing. More than this: somebody keeps writing them."""


class RetainedMessages:
    """Clears retained messages, each time on a connection of its own."""

    def __init__(self, settings: Settings, quiet_seconds: float = QUIET_SECONDS) -> None:
        self._settings = settings
        self._quiet = quiet_seconds

    async def clear(self, filters: Sequence[str]) -> list[str]:
        """Clear all that match; the topics, in order.

        Raises UnavailableError while the broker does not answer, or retained messages keep coming back.
        """
        cleared: set[str] = set()
        for _ in range(PASSES):
            try:
                async with asyncio.timeout(PASS_SECONDS):
                    found = await self._clear_once(filters)
            except TimeoutError as error:
                raise UnavailableError(
                    f"cannot clear retained messages: not done within {PASS_SECONDS:.0f} s, the broker is slow or away"
                ) from error
            if not found:
                return sorted(cleared)
            cleared |= found
        raise UnavailableError(
            f"retained messages come back as often as they are cleared, on {', '.join(sorted(found)[:3])}; "
            "somebody who is not shut out keeps writing them"
        )

    async def _clear_once(self, filters: Sequence[str]) -> set[str]:
        found: set[str] = set()
        heard = asyncio.Event()

        def take(topic: str, payload: bytes) -> None:
            if payload:
                found.add(topic)
                heard.set()

        connection = Connection(f"tidegate-cleaner-{uuid.uuid4().hex[:12]}")
        connection.collect_retained(take)
        try:
            await connection.open(self._settings, filters)
            await self._until_quiet(heard)
            for topic in found:
                connection.publish_retained(topic, b"")
        except (OSError, TimeoutError) as error:
            raise UnavailableError(
                f"cannot clear retained messages: {error or 'the broker does not answer'}"
            ) from error
        finally:
            await connection.close()
        return found

    async def _until_quiet(self, heard: asyncio.Event) -> None:
        async with asyncio.timeout(MOST_SECONDS):
            while True:
                heard.clear()
                try:
                    await asyncio.wait_for(heard.wait(), self._quiet)
                except TimeoutError:
                    return
