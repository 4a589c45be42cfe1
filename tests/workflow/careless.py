"""A decision that asks the clock: what `domain` must never do, and the sandbox is there to notice."""

from datetime import datetime


def decide() -> str:
    """Not a function of its arguments."""
    return datetime.now().isoformat()
