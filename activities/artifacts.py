"""What a rollout needs before its first wave: the deltas from the images in the field, and the job document.

A delta is derived data, and never a reason to stop a rollout: one that cannot be made leaves a reason in the table
`deltas`, and its devices get the full image. Only a server that does not answer (PostgreSQL, the artifact store) makes
an activity fail, and be tried again.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import structlog
from prometheus_client import Counter
from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.artifact_store import ArtifactStore
from activities.delta_builder import DeltaBuilder, DeltaNotBuiltError
from firmware.delta import CODECS, too_large
from models.artifacts import BuildDeltaInput, BuildDeltaResult, DeltaRecord, DeltaRef
from models.errors import NotFoundError, VerificationError
from models.ids import SHA256
from models.rollout import PrepareArtifactsInput, PrepareArtifactsResult
from store.deltas import DeltaStore

MAX_BASES = 8
"""Deltas of one rollout: a fleet with more images than that in the field has its rarest served by the full image."""
BUILDING_TIME = timedelta(minutes=15)
"""After this no further delta is begun: the rollout starts with what is ready, well within its workflow's timeout."""
HEARTBEAT_SECONDS = 5.0

DELTAS = Counter("tidegate_deltas", "Deltas asked for by rollouts.", ["result"])

log = structlog.get_logger()


class JobDocuments(Protocol):
    """Writes job documents: store.rollouts.RolloutStore."""

    async def write_document(self, job_no: int, deltas: list[DeltaRef]) -> None:
        """Write the job's document with these deltas; idempotent."""


@dataclass
class ArtifactActivities:
    """Deltas and job documents. For the task queue of CPU-bound work."""

    artifacts: ArtifactStore
    deltas: DeltaStore
    rollouts: JobDocuments
    builder: DeltaBuilder = field(default_factory=DeltaBuilder)

    @activity.defn
    async def build_delta(self, wanted: BuildDeltaInput) -> BuildDeltaResult:
        """One delta, or the reason why there is none.

        Idempotent by (base, target, codec): what the table and the store have is used, and a second run of the same
        build makes the same bytes under the same name.
        """
        async with _heartbeats():
            return await self._build(wanted)

    @activity.defn
    async def prepare_artifacts(self, plan: PrepareArtifactsInput) -> PrepareArtifactsResult:
        """Deltas from the most frequent images in the field, then the job document.

        Idempotent: deltas that exist are used again, and the document is written as a whole.
        """
        if not await self.artifacts.exists(plan.target_sha256):
            raise ApplicationError(
                f"cannot prepare job {plan.job_no}: image {plan.target_sha256} is not in the artifact store; "
                "publish its release again",
                non_retryable=True,
            )
        async with _heartbeats():
            results = await self._build_all(_bases(plan), plan.target_sha256)
            deltas = [result.delta for _, result in results if result.delta]
            await self.rollouts.write_document(plan.job_no, deltas)
        return PrepareArtifactsResult(
            built=sum(result.delta is not None and not result.reused for _, result in results),
            reused=sum(result.delta is not None and result.reused for _, result in results),
            failed=tuple(f"{base[:12]}: {result.failure}" for base, result in results if result.failure),
            delta_bytes=sum(delta.size_bytes for delta in deltas),
        )

    async def _build_all(self, bases: list[str], target: str) -> list[tuple[str, BuildDeltaResult]]:
        results, end = [], time.monotonic() + BUILDING_TIME.total_seconds()
        for base in bases:
            wanted = BuildDeltaInput(base_sha256=base, target_sha256=target)
            if time.monotonic() < end:
                results.append((base, await self._build(wanted)))
            else:
                reason = f"not begun: those before it took more than {BUILDING_TIME.total_seconds() / 60:.0f} minutes"
                results.append((base, self._failed(wanted, reason)))
        return results

    async def _build(self, wanted: BuildDeltaInput) -> BuildDeltaResult:
        known = await self.deltas.find(wanted)
        if known and known.failure:
            DELTAS.labels("refused-before").inc()
            return BuildDeltaResult(failure=known.failure, reused=True)
        if known and known.delta and await self.artifacts.exists(known.delta.sha256):
            DELTAS.labels("reused").inc()
            return BuildDeltaResult(delta=known.delta, reused=True)
        try:
            patch = await self._patch(wanted)
        except DeltaNotBuiltError as error:
            if error.lasting:
                await self.deltas.record(wanted, DeltaRecord(failure=str(error)))
            return self._failed(wanted, str(error))
        delta = DeltaRef(
            base_sha256=wanted.base_sha256,
            sha256=await self.artifacts.put(patch),
            size_bytes=len(patch),
            codec=wanted.codec,
        )
        await self.deltas.record(wanted, DeltaRecord(delta=delta))
        DELTAS.labels("built").inc()
        log.info("delta built", base=wanted.base_sha256, target=wanted.target_sha256, size_bytes=len(patch))
        return BuildDeltaResult(delta=delta)

    async def _patch(self, wanted: BuildDeltaInput) -> bytes:
        """A delta worth offering. Raises DeltaNotBuiltError."""
        codec = CODECS.get(wanted.codec)
        if codec is None:
            raise DeltaNotBuiltError(f"no codec named {wanted.codec}; there is {', '.join(CODECS)}", lasting=True)
        images = (wanted.base_sha256, wanted.target_sha256)
        sizes = [await self.artifacts.size(image) or 0 for image in images]
        if max(sizes) > codec.max_image_bytes:
            raise DeltaNotBuiltError(too_large(codec), lasting=True)
        try:
            base, target = [await self.artifacts.get(image) for image in images]
        except (NotFoundError, VerificationError) as error:  # publishing the image again mends it
            raise DeltaNotBuiltError(str(error), lasting=False) from error
        patch = await self.builder.build(codec.name, base, target)
        if len(patch) >= len(target):
            reason = f"the delta has {len(patch)} bytes, the image itself {len(target)}"
            raise DeltaNotBuiltError(reason, lasting=True)
        return patch

    def _failed(self, wanted: BuildDeltaInput, reason: str) -> BuildDeltaResult:
        DELTAS.labels("failed").inc()
        log.warning("no delta", base=wanted.base_sha256, target=wanted.target_sha256, reason=reason)
        return BuildDeltaResult(failure=reason)


def _bases(plan: PrepareArtifactsInput) -> list[str]:
    """The images worth a delta, most frequent first. What devices report is not always the name of an image."""
    usable = [base for base in plan.bases if base[0] != plan.target_sha256 and SHA256.fullmatch(base[0])]
    return [sha256 for sha256, _ in sorted(usable, key=lambda base: -base[1])[:MAX_BASES]]


@asynccontextmanager
async def _heartbeats() -> AsyncIterator[None]:
    """Heartbeat for as long as the block runs, however long one step of it takes."""

    async def beat() -> None:
        while True:
            activity.heartbeat()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()
