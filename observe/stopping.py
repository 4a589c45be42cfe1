"""Waiting in a process that is to stop when it is told to: pauses, and what is tried until it works.

Both end with `stop`, the event that SIGTERM sets.

```python
client = await patiently(log, "Temporal", lambda: connect(address), stop, UnavailableError)
```
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

RETRY_SECONDS = 1.0

T = TypeVar("T")


async def pause(stop: asyncio.Event, seconds: float) -> None:
    """Wait for so long, or until `stop` is set."""
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)


async def patiently(
    log: Any, what: str, attempt: Callable[[], Awaitable[T]], stop: asyncio.Event, *away: type[Exception]
) -> T | None:
    """Try until it works; None when stopped before. Says what it waits for once, and again when the reason changes.

    Args:
        away: what is raised while it is worth trying again.
    """
    said = ""
    while not stop.is_set():
        try:
            return await attempt()
        except away as error:
            if str(error) != said:
                log.warning(f"waiting for {what}", reason=str(error))
            said = str(error)
            await pause(stop, RETRY_SECONDS)
    return None
