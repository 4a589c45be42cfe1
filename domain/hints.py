"""How many devices to tell now that an update waits for them. Pure; it decides no admission.

A hint makes a device ask; PostgreSQL alone says whether it may start. So a hint too many costs one request that is
answered with nothing, and a hint too few leaves a slot empty for a tick. The rule: as many hints as there will be free
slots, less the hints that are still on their way.

>>> hints_to_send(HintNeeds(cap=500, in_flight=420, hinted=100, admitted=70, queued=4000))
50
"""

from dataclasses import dataclass
from datetime import timedelta

MAX_HINTS_PER_TICK = 1000
"""Bounds one tick's work, so that a driver heartbeats and sweeps between batches however large the cap is."""

PACE_WINDOW = timedelta(seconds=60)
"""The window of `pace.per_minute`."""

HINT_LIFETIME = timedelta(seconds=2)
"""A hint that brought no admission within this time found nobody: its slot is offered to another device."""

FIRST_REPEAT = timedelta(seconds=1)
"""After everyone has been told once, those still queued are told again; first soon, a message may have been lost."""

MAX_REPEAT = timedelta(minutes=5)
"""Then ever more rarely: a device that was away asks by itself when it comes back."""


@dataclass(frozen=True, slots=True)
class HintNeeds:
    """What the decision needs to know.

    Attributes:
        cap: executions that may be in progress at one moment.
        in_flight: executions in progress now.
        hinted: hints sent within HINT_LIFETIME.
        admitted: admissions within HINT_LIFETIME.
        queued: executions that wait for a hint or an answer.
        per_minute: admissions allowed in any PACE_WINDOW; None: no limit.
        admitted_in_window: admissions within the last PACE_WINDOW, as far as known.
        soon_free: slots expected to become free before the next decision.
    """

    cap: int
    in_flight: int
    hinted: int
    admitted: int
    queued: int
    per_minute: int | None = None
    admitted_in_window: int = 0
    soon_free: int = 0


def hints_to_send(needs: HintNeeds) -> int:
    """Devices to tell now: never negative, never more than are queued, never more than MAX_HINTS_PER_TICK."""
    on_their_way = max(0, needs.hinted - needs.admitted)
    room = needs.cap - needs.in_flight + needs.soon_free
    if needs.per_minute is not None:
        room = min(room, needs.per_minute - needs.admitted_in_window)
    return max(0, min(room - on_their_way, needs.queued - on_their_way, MAX_HINTS_PER_TICK))


def next_repeat(last: timedelta, *, admitted_since: int) -> timedelta:
    """How long to wait before everyone still queued is told again: doubled while it brings nobody, else from new."""
    return FIRST_REPEAT if admitted_since else min(max(2 * last, FIRST_REPEAT), MAX_REPEAT)
