"""Failures of a job: which of them to ask the devices about, and what they have in common."""

from dataclasses import dataclass

from psycopg import AsyncConnection
from psycopg.rows import class_row

from domain.causes import FailureGroup, causes_of
from domain.diagnosis import summary
from models.diagnostics import AUTOMATIC_TYPES, CauseView

MAX_TEXTS = 5000
"""Different texts that are looked at, the most frequent ones: a fleet that invents a new one for each failure is shown
in part, and its shares are of all failures all the same."""

PER_CAUSE = 5
"""Devices asked of each failure class of a wave: the fifth says what the first four have said, and costs a device that
is in trouble two messages more."""

PER_JOB = 20
"""Devices asked of one job: 40 workflows. With 50, Temporal spent more on questions than on a rollout to 2,000 devices."""

_FAILED = "e.state IN ('FAILED','REJECTED','TIMED_OUT') AND e.failure_class IS NOT NULL"
"""A device that never asked for its update has done nothing yet: its time ran out without a failure class."""

_TO_DIAGNOSE = f"""
WITH failed AS (
    SELECT e.device_id, e.execution_number, e.wave, e.finished_at,
           row_number() OVER (PARTITION BY e.wave, e.failure_class ORDER BY e.finished_at, e.device_id) AS place
    FROM executions e JOIN jobs j USING (job_no)
    WHERE e.job_no = %(job_no)s AND j.operation = 'firmware-update' AND {_FAILED}
      AND e.failure_class <> 'rejected-by-user'
), chosen AS (
    SELECT device_id, execution_number, finished_at FROM failed WHERE place <= %(per_cause)s
    ORDER BY finished_at, device_id LIMIT %(per_job)s
)
SELECT c.device_id, c.execution_number FROM chosen c
WHERE c.finished_at > now() - interval '1 day'
  AND (SELECT count(*) FROM diagnostics d WHERE d.job_no = %(job_no)s AND d.device_id = c.device_id
       AND d.execution_number = c.execution_number) < %(questions)s
ORDER BY c.finished_at, c.device_id
"""
"""First by the time of failure, so that later failures never change who was chosen before. What failed a day ago is not
asked about any more: the device would tell of other things, and questions that old may have been deleted."""

_GROUPS = f"""
WITH spoken AS (
    SELECT DISTINCT device_id FROM diagnostics WHERE job_no = %(job_no)s AND state = 'answered'
)
SELECT e.failure_class, e.reason, count(*)::int AS count,
       coalesce(min(s.device_id), min(e.device_id)) AS example, min(e.finished_at) AS first_at,
       max(e.finished_at) AS last_at, count(s.device_id)::int AS diagnosed
FROM executions e LEFT JOIN spoken s USING (device_id)
WHERE e.job_no = %(job_no)s AND {_FAILED}
GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2 LIMIT %(limit)s
"""

_TOTAL = f"SELECT count(*) FROM executions e WHERE e.job_no = %s AND {_FAILED}"

_SAID = """
SELECT device_id, type, answer FROM diagnostics
WHERE job_no = %s AND device_id = ANY(%s) AND state = 'answered' ORDER BY device_id, created_at
"""


@dataclass(frozen=True, slots=True)
class Undiagnosed:
    """A failed attempt that nobody has asked the device about yet."""

    device_id: str
    attempt: int


async def failures_to_diagnose(connection: AsyncConnection, job_no: int) -> list[Undiagnosed]:
    """Failed updates whose devices are to be asked: the first of each failure class and wave, bounded in all."""
    arguments = {"job_no": job_no, "per_cause": PER_CAUSE, "per_job": PER_JOB, "questions": len(AUTOMATIC_TYPES)}
    cursor = await connection.execute(_TO_DIAGNOSE.encode(), arguments)
    return [Undiagnosed(*row) for row in await cursor.fetchall()]


async def causes(connection: AsyncConnection, job_no: int) -> list[CauseView]:
    """Failures of a job by cause, the most frequent first, with what an example's diagnostics said."""
    async with connection.cursor(row_factory=class_row(FailureGroup)) as cursor:
        await cursor.execute(_GROUPS.encode(), {"job_no": job_no, "limit": MAX_TEXTS})
        groups = await cursor.fetchall()
    row = await (await connection.execute(_TOTAL.encode(), (job_no,))).fetchone()
    found = causes_of(groups, row[0] if row else None)
    examples = [cause.example for cause in found if cause.diagnosed]
    said: dict[str, list[str]] = {}
    for device, what, answer in await (await connection.execute(_SAID, (job_no, examples))).fetchall():
        said.setdefault(device, []).append(summary(what, answer or {}))
    return [
        CauseView(
            failure_class=cause.failure_class,
            reason=cause.reason,
            count=cause.count,
            share=round(cause.share, 4),
            example=cause.example,
            example_reason=cause.example_reason,
            first_at=cause.first_at,
            last_at=cause.last_at,
            diagnosed=cause.diagnosed,
            said="; ".join(filter(None, said.get(cause.example, []))),
        )
        for cause in found
    ]
