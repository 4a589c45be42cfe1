"""What the gateway keeps of judging heartbeats: progress by device and rule, and the alerts it opens and resolves.

All of it belongs to the transaction that uses the heartbeats. Rules are locked first (shared), then progress, then
alerts, each in order of devices, as everybody does who changes them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import orjson
from psycopg import AsyncConnection

from domain.alerting import WELL, Progress
from models.device import DeviceRecord

JUDGE = "gateway"
"""Who resolves an alert whose device is well again."""

_SUSPECTS = """
SELECT d.device_id, d.device_type, d.serial_number, d.site_id, d.status, d.tags, d.firmware_version
FROM jsonb_array_elements_text(%s::jsonb) AS t(device_id) JOIN devices d USING (device_id)
"""

_PROGRESS = """
SELECT p.device_id, p.rule, p.firing, p.in_a_row, extract(epoch FROM p.since)::float8
FROM jsonb_array_elements_text(%s::jsonb) AS t(device_id) JOIN alert_progress p USING (device_id)
ORDER BY p.device_id, p.rule FOR UPDATE OF p
"""

_SAVE_PROGRESS = """
INSERT INTO alert_progress (device_id, rule, firing, in_a_row, since)
SELECT device_id, rule, firing, in_a_row, to_timestamp(since)
FROM json_to_recordset(%s::json) AS n(device_id text, rule text, firing boolean, in_a_row integer, since float8)
ORDER BY device_id, rule
ON CONFLICT (device_id, rule) DO UPDATE
SET firing = excluded.firing, in_a_row = excluded.in_a_row, since = excluded.since
"""

_FORGET_PROGRESS = """
DELETE FROM alert_progress p USING json_to_recordset(%s::json) AS n(device_id text, rule text)
WHERE p.device_id = n.device_id AND p.rule = n.rule
"""

_OPEN = """
INSERT INTO alerts AS a (rule, subject, text, severity, state, occurrences)
SELECT rule, device_id, text, severity, 'open', times
FROM json_to_recordset(%s::json) AS n(rule text, device_id text, text text, severity text, times integer)
ORDER BY rule, device_id
ON CONFLICT (rule, subject) WHERE state <> 'resolved'
DO UPDATE SET text = excluded.text, severity = excluded.severity, occurrences = a.occurrences + excluded.occurrences,
  last_at = now()
"""

_COUNT = """
UPDATE alerts a SET text = n.text, severity = n.severity, occurrences = a.occurrences + n.times, last_at = now()
FROM json_to_recordset(%s::json) AS n(rule text, device_id text, text text, severity text, times integer)
WHERE a.rule = n.rule AND a.subject = n.device_id AND a.state <> 'resolved'
"""

_RESOLVE = f"""
UPDATE alerts a SET state = 'resolved', resolved_at = now(), resolved_by = '{JUDGE}'
FROM json_to_recordset(%s::json) AS n(rule text, device_id text)
WHERE a.rule = n.rule AND a.subject = n.device_id AND a.state <> 'resolved'
"""

Place = tuple[str, str]
"""(device id, rule)."""


@dataclass(frozen=True, slots=True)
class Note:
    """What an alert says, how much it matters, and how many heartbeats more it has come with."""

    text: str
    severity: str
    times: int = 1


Step = tuple[Literal["open", "count", "resolve"], Note | None]


@dataclass(slots=True)
class Verdicts:
    """What a batch's heartbeats have changed. The steps of a place are written one after the other: an alert may be over
    and come again within a batch."""

    progress: dict[Place, Progress] = field(default_factory=dict)
    steps: dict[Place, list[Step]] = field(default_factory=dict)

    def resolve(self, place: Place) -> None:
        """The alert is over."""
        self.steps.setdefault(place, []).append(("resolve", None))

    def raise_(self, place: Place, note: Note, *, opens: bool) -> None:
        """The alert opens, or has come with a heartbeat more."""
        steps = self.steps.setdefault(place, [])
        if not opens and steps and (last := steps[-1][1]) is not None:
            steps[-1] = (steps[-1][0], replace(note, times=last.times + 1))
        else:
            steps.append(("open" if opens else "count", note))


async def lock_rules(connection: AsyncConnection) -> dict[str, int]:
    """The rules that are enabled, and their revisions; nobody changes one before this transaction has ended."""
    cursor = await connection.execute("SELECT name, revision FROM alert_rules WHERE enabled ORDER BY name FOR SHARE")
    return {row[0]: row[1] for row in await cursor.fetchall()}


async def load_suspects(
    connection: AsyncConnection, devices: Sequence[str]
) -> tuple[dict[str, DeviceRecord], dict[Place, Progress]]:
    """These devices, as far as a rule's target asks, and where they are on their way; those of them that exist."""
    parameter = (orjson.dumps(list(devices)).decode(),)
    known = await connection.execute(_SUSPECTS, parameter)
    under_way = await connection.execute(_PROGRESS, parameter)
    facts = {
        row[0]: DeviceRecord.model_construct(
            device_id=row[0],
            device_type=row[1],
            serial_number=row[2],
            site_id=row[3],
            status=row[4],
            tags=row[5],
            firmware_version=row[6],
        )
        for row in await known.fetchall()
    }
    return facts, {(row[0], row[1]): Progress(row[2], row[3], row[4]) for row in await under_way.fetchall()}


async def save_verdicts(connection: AsyncConnection, before: Mapping[Place, Progress], verdicts: Verdicts) -> None:
    """Write what has changed; in a pipeline it costs no round trip."""
    changed = {place: now for place, now in verdicts.progress.items() if before.get(place, WELL) != now}
    kept = [
        {"device_id": place[0], "rule": place[1], "firing": now.firing, "in_a_row": now.in_a_row, "since": now.since}
        for place, now in changed.items()
        if now != WELL
    ]
    await _write(connection, _SAVE_PROGRESS, kept)
    await _write(connection, _FORGET_PROGRESS, _places(place for place, now in changed.items() if now == WELL))
    for number in range(max(map(len, verdicts.steps.values()), default=0)):
        step = [(place, *steps[number]) for place, steps in verdicts.steps.items() if number < len(steps)]
        await _write(connection, _RESOLVE, _places(place for place, kind, _ in step if kind == "resolve"))
        for wanted, statement in (("open", _OPEN), ("count", _COUNT)):
            rows = [
                {"rule": place[1], "device_id": place[0], "text": n.text, "severity": n.severity, "times": n.times}
                for place, kind, n in step
                if kind == wanted and n is not None
            ]
            await _write(connection, statement, rows)


def _places(places: Iterable[Place]) -> list[dict[str, object]]:
    return [{"device_id": device, "rule": rule} for device, rule in places]


async def _write(connection: AsyncConnection, statement: str, rows: Sequence[Mapping[str, object]]) -> None:
    if rows:
        await connection.execute(statement, (orjson.dumps(rows).decode(),))
