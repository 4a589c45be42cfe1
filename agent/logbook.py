"""What a device remembers of its own doings, to be asked for from afar (`log-tail`): the last lines, in memory.

In memory alone, because a log in flash wears it out; after a power cut it begins anew. Bounded in lines and in the
length of each, so that whatever is noted costs no more than a few hundred KiB.
"""

import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime

MAX_LINES = 1000
MAX_LINE_CHARS = 400


class LogBook:
    """The last `MAX_LINES` lines. Shared by all boots of one device in one process."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lines: deque[str] = deque(maxlen=MAX_LINES)

    def note(self, text: str) -> None:
        """Add a line, with the time in front; what would break the line is taken out of it."""
        moment = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._lines.append(f"{moment} {' '.join(text.split())}"[:MAX_LINE_CHARS])

    def say(self, thing: str, text: str) -> None:
        """Note it, and tell whoever watches the process."""
        self.note(text)
        print(f"{thing}: {text}", file=sys.stderr, flush=True)

    def tail(self, lines: int) -> list[str]:
        """The last so many, oldest first."""
        return list(self._lines)[-lines:] if lines > 0 else []
