"""The steps of a certificate's rotation that touch PostgreSQL or the broker. Each is idempotent; see its docstring."""

from dataclasses import dataclass

from temporalio import activity

from activities.lifecycle import RotationRecords, command_hint
from activities.rollout_records import NoticePublisher
from models.identity import RotateCertificateInput
from models.lifecycle import (
    AskForRotationInput,
    CertificatesSeen,
    EndedRotation,
    EndRotationInput,
    RotationSeen,
)


@dataclass
class RotationActivities:
    """Collaborators: certificates, and a way to tell devices."""

    records: RotationRecords
    publisher: NoticePublisher

    @activity.defn
    async def look_at_certificates(self, asked: RotateCertificateInput) -> CertificatesSeen:
        """Which certificates are to be replaced. Reads only; raises NotFoundError and RefusedError."""
        return await self.records.look(asked.device_id, ask=asked.ask)

    @activity.defn
    async def ask_for_rotation(self, asked: AskForRotationInput) -> RotationSeen:
        """Wait, and ask the device. Idempotent: a command that is open is opened once, and a hint may come twice."""
        seen = await self.records.ask(asked)
        if asked.ask and seen.issued is None:
            await self.publisher.publish(*command_hint(asked.device_id))
        return seen

    @activity.defn
    async def settle_rotation(self, asked: EndRotationInput) -> EndedRotation:
        """Revoke what the confirmed certificate replaces. Idempotent: what is revoked stays as it is."""
        return await self.records.settle(asked)

    @activity.defn
    async def give_up_rotation(self, asked: EndRotationInput) -> EndedRotation:
        """The device did not come. Idempotent: it says again what it finds."""
        return await self.records.give_up(asked)

    @activity.defn
    async def revert_rotation(self, asked: EndRotationInput) -> EndedRotation:
        """Revoke the certificate that was not seen. Idempotent: what is revoked stays as it is."""
        return await self.records.revert(asked)
