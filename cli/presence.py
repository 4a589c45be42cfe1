"""What a device said last, as a person reads it."""

from collections.abc import Iterator
from datetime import datetime, timedelta

from cli.output import ago, rough, size, when
from models.health import PresenceView


def presence_facts(presence: PresenceView, limit: timedelta, now: datetime) -> Iterator[tuple[str, object]]:
    """What a device said last, and whether it counts as offline."""
    after = presence.offline_after_seconds
    limit = limit if after is None else timedelta(seconds=after)
    if presence.last_heartbeat is None:
        yield "connectivity", "never heard"
        return
    if presence.offline_since is None:
        yield "connectivity", f"online (offline after {rough(limit)} of silence)"
    else:
        yield "connectivity", f"offline, found {ago(presence.offline_since, now)}"
    yield "last heartbeat", f"{ago(presence.last_heartbeat, now)}, {when(presence.last_heartbeat)}"
    if presence.uptime is not None:
        yield "uptime", rough(timedelta(seconds=min(presence.uptime, 10**9)))
    yield "free memory", None if presence.free_memory is None else size(presence.free_memory)
    yield "cpu temperature", presence.cpu_temperature
    yield "signal strength", presence.signal_strength
    yield "errors", presence.error_count
    yield "firmware", presence.firmware_version
    yield "boot id", presence.boot_id
    yield from (presence.extra or {}).items()
