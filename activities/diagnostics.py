"""The steps of a question to a device that touch PostgreSQL or the broker. Each is idempotent by the request id."""

from dataclasses import dataclass

from temporalio import activity

from activities.lifecycle import DiagnosticRecords
from activities.rollout_records import NoticePublisher
from models.diagnostics import (
    AskDeviceInput,
    BootSeen,
    EndedQuestion,
    EndQuestionInput,
    LookAtBootInput,
    OpenedQuestion,
    PublishQuestionInput,
)
from models.protocol import diagnostics_topic


@dataclass
class DiagnosticActivities:
    """Collaborators: what devices were asked, and a way to ask them."""

    records: DiagnosticRecords
    publisher: NoticePublisher

    @activity.defn
    async def open_question(self, asked: AskDeviceInput) -> OpenedQuestion:
        """Write the question, and wait for its answer. Idempotent: the same question is one row.

        Raises NotFoundError, RefusedError (barred, retired) and ConflictError (the id is another question's).
        """
        return await self.records.open(asked)

    @activity.defn
    async def publish_question(self, asked: PublishQuestionInput) -> None:
        """Send it, unless it is over. May be sent any number of times: the device answers once."""
        message = await self.records.message(asked.request_id)
        if message is not None:
            await self.publisher.publish(diagnostics_topic(asked.device_id, "request"), message)

    @activity.defn
    async def end_question(self, asked: EndQuestionInput) -> EndedQuestion:
        """Wait no longer. Idempotent: what a question ended with stays."""
        return await self.records.end(asked)

    @activity.defn
    async def look_at_boot(self, asked: LookAtBootInput) -> BootSeen:
        """Whether the device has booted since it answered. Waits for the next heartbeat, but for the last look."""
        return await self.records.look_at_boot(asked)
