"""The stand-in's jobs with tasks in them: what a fleet job that is no firmware looks like to a device."""

import random
import time
from dataclasses import dataclass, field
from typing import Any

from firmware.task import Task, encode_task, task_signer
from tests.agent_standin import Job, Published, Publisher, StandInJobs


@dataclass(frozen=True)
class Tasked:
    """Stands in the place of a release. `order`: fields of the statement that are to be other than they should."""

    operation: str
    payload: dict[str, Any] = field(default_factory=dict)
    order: dict[str, Any] = field(default_factory=dict)


class TaskPublisher(Publisher):
    """Signs tasks as well. The same attempt has the same nonce, as no real gateway would: a replay is then exact."""

    def document(self, thing: str, job_id: str, attempt: int, release: Any, **order: Any) -> dict[str, Any]:
        if isinstance(release, Published):
            return super().document(thing, job_id, attempt, release, **order)
        now = int(time.time())
        fields = {"device_id": thing, "job_id": job_id, "attempt": attempt, "operation": release.operation}
        fields |= {"payload": release.payload, "issued_at": now, "expires_at": now + 3600}
        nonce = random.Random(f"{thing} {job_id} {attempt}").randbytes(16).hex()
        envelope = task_signer(self.order_private).sign(
            encode_task(Task(**{**fields, "nonce": nonce, **release.order, **order}))
        )
        return {"operation": release.operation, **release.payload, "order": envelope}


def queue_task(jobs: StandInJobs, thing: str, job_id: str, task: Tasked, attempts: int = 1) -> Job:
    """Like `StandInJobs.queue`."""
    return jobs.queue(thing, job_id, task, attempts)  # type: ignore[arg-type]
