"""The heartbeats of one batch: each is recorded, and the newest of each device is what it says of now.

A device says "I am another boot than before" by its boot id, and store/devicetraffic.py has to see each change of it to
tell one device from two. So the heartbeats of a device are counted in rounds, of one boot each; presence is brought to
the newest of a round, one round after the other. Nearly every batch has one heartbeat of each device, and one round.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from gateway.requests import Heartbeat

MAX_ROUNDS = 4
"""Most heartbeats of one device that presence is brought to in one batch, each of another boot than the one before."""


@dataclass(slots=True)
class Beats:
    """What was said, in its order. What a batch holds twice, word for word and with the same time, was said once."""

    said: list[Heartbeat] = field(default_factory=list)
    _last: dict[str, Heartbeat] = field(default_factory=dict)
    _heard: dict[tuple[object, ...], Heartbeat] = field(default_factory=dict)
    """By device, time, boot and uptime, of devices that have said more than one thing."""

    def add(self, beat: Heartbeat) -> None:
        """Take a heartbeat up, and give it its place; the one that it had in a batch that failed is no more."""
        thing = beat.device_id
        last = self._last.get(thing)
        beat.beat_no, beat.round, beat.newest = 0, 0, True
        if last is not None:
            if self._repeats(last, beat):
                return
            beat.beat_no, beat.round = last.beat_no + 1, last.round
            if beat.boot_id is None or beat.boot_id == last.boot_id or last.round + 1 >= MAX_ROUNDS:
                last.newest = False
            else:
                beat.round += 1
        self._last[thing] = beat
        self.said.append(beat)

    def _repeats(self, last: Heartbeat, beat: Heartbeat) -> bool:
        """Whether this one is in the batch already: the broker delivers again what waited while the link broke."""
        self._heard[_key(last)] = last
        return beat.device_time is not None and self._heard.get(_key(beat)) == beat

    @property
    def things(self) -> Iterable[str]:
        """Who has said something."""
        return self._last.keys()

    def without(self, barred: frozenset[str]) -> "Beats":
        """What is left when these devices have said nothing."""
        return Beats(
            [beat for beat in self.said if beat.device_id not in barred],
            {thing: beat for thing, beat in self._last.items() if thing not in barred},
        )


def _key(beat: Heartbeat) -> tuple[object, ...]:
    return beat.device_id, beat.device_time, beat.boot_id, beat.uptime
