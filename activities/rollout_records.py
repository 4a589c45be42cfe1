"""What the rollout's activities need of their collaborators: PostgreSQL, and a way to publish.

`store.rollouts.RolloutStore` and `transport.publisher.Publisher` are these. Naming only what is used keeps the store,
and with it SQLModel, out of what a workflow imports; and tests script a rollout without a database.
"""

from collections.abc import Sequence
from typing import Protocol

from models.artifacts import DeltaRef
from models.rollout import (
    FinishRolloutResult,
    JobProgress,
    JobStatus,
    Outcome,
    Phase,
    PlanRolloutInput,
    PlanRolloutResult,
    WaveProgress,
    WaveVerdict,
)
from models.spec import PaceSpec


class RolloutRecords(Protocol):
    """What is true of a rollout. Every method is idempotent; errors are models.errors'."""

    async def plan(self, request: PlanRolloutInput, /) -> PlanRolloutResult:
        """Choose, order and cut; the same specification again returns the plan that exists."""

    async def write_document(self, job_no: int, deltas: list[DeltaRef], /) -> None:
        """Write what devices are told."""

    async def open_wave(self, job_no: int, wave: int, /) -> WaveProgress:
        """Begin admission of a wave."""

    async def progress(self, job_no: int, wave: int, /) -> JobProgress:
        """The wave and its job now."""

    async def sweep(self, job_no: int, /) -> int:
        """Time out what is overdue; how many."""

    async def take_hints(self, job_no: int, wave: int, limit: int, /) -> Sequence[str]:
        """Devices to tell next; fewer than `limit`: the pass is over."""

    async def take_due_retries(
        self, job_no: int, wave: int, after: tuple[float, str], limit: int, /
    ) -> Sequence[tuple[float, str, int]]:
        """(when, device, its number) of next attempts that have become due since `after`, in their order."""

    async def rewind_hints(self, job_no: int, wave: int, /) -> None:
        """Begin the pass again."""

    async def close_wave(self, job_no: int, wave: int, verdict: WaveVerdict, /) -> WaveProgress:
        """Record a verdict; HALT stops admission in the same transaction."""

    async def set_status(self, job_no: int, status: JobStatus, phase: Phase, reason: str, actor: str, /) -> None:
        """Admit, or admit no more."""

    async def set_phase(self, job_no: int, phase: Phase, reason: str, /) -> None:
        """What is shown of a job that runs; a job that is paused or over keeps what it shows."""

    async def set_pace(self, job_no: int, pace: PaceSpec, actor: str, /) -> None:
        """New cap and pace."""

    async def withdraw(self, job_no: int, reason: str, /) -> None:
        """Stop admission, and cancel what has not started."""

    async def cancel_running(self, job_no: int, reason: str, /) -> Sequence[str]:
        """Cancel what is in progress; the devices to tell."""

    async def join(self, job_no: int, /) -> int:
        """Take in devices that match a continuous job by now; how many."""

    async def withdrawn(self, job_no: int, /) -> Sequence[str]:
        """Devices to tell that their update was withdrawn."""

    async def in_flight(self, job_no: int, /) -> int:
        """Devices that update now."""

    async def finish(self, job_no: int, outcome: Outcome, reason: str, /) -> FinishRolloutResult:
        """Close the job."""

    async def failures_to_diagnose(self, job_no: int, /) -> Sequence[tuple[str, int]]:
        """Devices to ask about their failed attempt, bounded; none that was asked before."""

    async def wait_for_change(self, job_no: int, timeout: float, /) -> bool:
        """Return early when a wave of the job answered, ran empty or tripped."""


class NoticePublisher(Protocol):
    """Sends hints. May lose them."""

    async def publish(self, topic: str, payload: bytes, /) -> None:
        """Send once, without waiting for an answer."""
