"""How often a device is reminded of what is wanted of it. Pure.

Each reminder comes twice as long after the one before, up to a limit, and never after the end of the wait.

>>> from datetime import timedelta
>>> pause = timedelta(seconds=30)
>>> longer(pause, timedelta(hours=6))
datetime.timedelta(seconds=60)
"""

from datetime import timedelta


def longer(pause: timedelta, rarest: timedelta) -> timedelta:
    """The pause after the one that has just passed."""
    return min(2 * pause, rarest)


def next_pause(pause: timedelta, left: timedelta) -> timedelta:
    """How long to wait now: the pause, or what is left of the whole wait."""
    return max(timedelta(0), min(pause, left))
