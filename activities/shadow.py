"""The steps of a wait for a device's shadow that touch PostgreSQL or the broker. Each is idempotent; see its docstring."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from temporalio import activity

from activities.rollout_records import NoticePublisher
from models.shadow import CheckShadowInput, EndShadowInput, ShadowSeen, WantShadowInput

Messages = Sequence[tuple[str, bytes]]


class ShadowRecords(Protocol):
    """`store.shadow_syncing.ShadowSyncStore`: each method is one transaction and can be repeated."""

    async def want(self, asked: WantShadowInput, /) -> tuple[ShadowSeen, Messages]:
        """Write it, and wait; what is to be published."""

    async def check(self, asked: CheckShadowInput, /) -> tuple[ShadowSeen, Messages]:
        """Whether it is reported; what is to be published."""

    async def end(self, asked: EndShadowInput, /) -> ShadowSeen:
        """Wait no longer."""


@dataclass
class ShadowActivities:
    """Collaborators: shadows, and a way to tell devices."""

    records: ShadowRecords
    publisher: NoticePublisher

    @activity.defn
    async def want_shadow(self, asked: WantShadowInput) -> ShadowSeen:
        """Write what is wanted and tell the device. Idempotent by `mark`: it is written once, and told once more.

        Raises NotFoundError, RefusedError (retired, barred), ConflictError (another version), InvalidInputError.
        """
        seen, messages = await self.records.want(asked)
        await self._publish(messages)
        return seen

    @activity.defn
    async def check_shadow(self, asked: CheckShadowInput) -> ShadowSeen:
        """Whether the device reports it; waits on where not. Idempotent: it reads, and a hint may come twice."""
        seen, messages = await self.records.check(asked)
        await self._publish(messages)
        return seen

    @activity.defn
    async def end_shadow(self, asked: EndShadowInput) -> ShadowSeen:
        """Wait no longer. Idempotent: a wait that is forgotten stays so."""
        return await self.records.end(asked)

    async def _publish(self, messages: Messages) -> None:
        for topic, payload in messages:
            await self.publisher.publish(topic, payload)
