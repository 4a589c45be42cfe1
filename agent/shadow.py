"""The device's classic shadow: what it is told to be it becomes, and says so.

The reference device has no lamp to switch: its state is what it has been told, kept in memory. It asks with every
connection, and when a delta is announced, for what differs; takes that; and reports it at the version that it has read,
so that it never reports what has just been changed once more. What is wanted is asked for again after each boot.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from agent.client import JobsClient
from agent.errors import RejectedError, RequestError
from models.protocol import shadow_topic

MOST_TRIES = 5
"""Of a report that meets another version each time; after that the next hint has to bring it."""


class ShadowKeeper:
    """Keeps the device as its shadow wants it. `state` is what the device is."""

    def __init__(self, client: JobsClient, poll_seconds: float, retry_seconds: float) -> None:
        self.state: dict[str, Any] = {}
        self._client = client
        self._poll_seconds = poll_seconds
        self._retry_seconds = retry_seconds

    async def run(self) -> None:
        """With every connection and every hint; and again after a while, when nobody answered."""
        failures = 0
        while True:
            await self._client.connected.wait()
            self._client.shadow_hint.clear()
            try:
                await self.once()
                failures, seconds = 0, self._poll_seconds
            except RequestError:
                failures += 1
                seconds = min(self._poll_seconds, self._retry_seconds * 2.0 ** min(failures, 20))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds * self._client.rng.uniform(0.5, 1.5)):
                    await self._client.shadow_hint.wait()

    async def once(self) -> None:
        """Ask, become, report. Raises RequestError."""
        for _ in range(MOST_TRIES):
            answer = await self._get()
            sections = answer.get("state")
            delta = sections.get("delta") if isinstance(sections, Mapping) else None
            if not isinstance(delta, Mapping) or not delta:
                return
            become(self.state, delta)
            report = {"state": {"reported": delta}, "version": answer.get("version")}
            try:
                await self._client.ask(shadow_topic(self._client.thing, "", "update"), report)
                return
            except RejectedError as error:
                if error.code != "409":
                    raise

    async def _get(self) -> Mapping[str, Any]:
        try:
            return await self._client.ask(shadow_topic(self._client.thing, "", "get"), {})
        except RejectedError as error:
            if error.code == "404":  # there is no shadow: nothing is wanted
                return {}
            raise


def become(state: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Take what differs: objects key by key, all else whole."""
    for key, value in delta.items():
        known = state.get(key)
        if isinstance(value, Mapping) and isinstance(known, dict):
            become(known, value)
        else:
            state[key] = value
