"""What the server says to a device of its own accord: `notify` and `notify-next`, as bytes. Pure.

Shapes are AWS IoT Jobs' (PROTOCOL.md, section 3). Both are hints: they carry no job document, and a device that never
hears them loses nothing, because whenever it asks it gets the truth.

>>> topic, payload = withdrawn_notices("motor-7", at=1767225600)[1]
>>> topic, payload
('$aws/things/motor-7/jobs/notify-next', b'{"timestamp":1767225600}')
"""

from dataclasses import dataclass

import orjson

from models.protocol import ExecutionState, jobs_topic

Notice = tuple[str, bytes]
"""Topic and payload."""


@dataclass(frozen=True, slots=True)
class OfferedJob:
    """An execution that is QUEUED, as its first version stands. Times are epoch seconds."""

    job_id: str
    queued_at: int
    version_number: int = 1
    execution_number: int = 1

    def summary(self) -> dict[str, object]:
        """A JobExecutionSummary."""
        return {
            "jobId": self.job_id,
            "queuedAt": self.queued_at,
            "lastUpdatedAt": self.queued_at,
            "versionNumber": self.version_number,
            "executionNumber": self.execution_number,
        }


def offer_notices(devices: list[str], job: OfferedJob, at: int) -> list[Notice]:
    """Tell each device that `job` waits for it: membership first, then the head of its queue."""
    queued = str(ExecutionState.QUEUED)
    membership = orjson.dumps({"timestamp": at, "jobs": {queued: [job.summary()]}})
    execution = {**job.summary(), "status": queued}
    notices: list[Notice] = []
    for device in devices:
        head = orjson.dumps({"timestamp": at, "execution": {**execution, "thingName": device}})
        notices.append((jobs_topic(device, "notify"), membership))
        notices.append((jobs_topic(device, "notify-next"), head))
    return notices


def withdrawn_notices(device: str, at: int) -> list[Notice]:
    """Tell a device that nothing waits for it any more."""
    return [
        (jobs_topic(device, "notify"), orjson.dumps({"timestamp": at, "jobs": {}})),
        (jobs_topic(device, "notify-next"), orjson.dumps({"timestamp": at})),
    ]
