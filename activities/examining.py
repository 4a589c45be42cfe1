"""Asking the devices whose update has failed how they are, without being told to.

Beside a wave's driver: it starts workflows of their own (workflows/diagnostic.py), so the wave's history knows nothing of
it. Who is asked is PostgreSQL's to say, bounded (store/causes.py); request ids come from the job, the device, the attempt
and the type, so an examiner that was killed is replaced by one that asks the same again, and the workflow that exists
answers for it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import psycopg
import structlog
from psycopg_pool import PoolTimeout
from temporalio.service import RPCError

from activities.lifecycle import DiagnosticFlows
from activities.rollout_records import RolloutRecords
from models.diagnostics import AUTOMATIC_TYPES, AskDeviceInput, automatic_request_id
from models.protocol import DiagnosticType

EXAMINE_EVERY = timedelta(seconds=2)
"""A device has just reported its failure and is there; the query reads all failures of the job."""

LOG_LINES = 200

log = structlog.get_logger()


@dataclass
class Examiner:
    """Starts the questions of one job. Without flows it does nothing."""

    job_no: int
    records: RolloutRecords
    flows: DiagnosticFlows | None
    clock: Callable[[], float] = time.monotonic
    _asked: set[tuple[str, int]] = field(default_factory=set)
    _failed: int = -1
    """At the last look. The first one is due whatever the wave counts: another's failures may have been left."""
    _next: float = 0.0

    async def look(self, failed: int | None = None) -> int:
        """Ask whom nobody has asked yet; how many devices. With `failed`, only where there are more than at the last look."""
        if self.flows is None or (failed is not None and (failed <= self._failed or self.clock() < self._next)):
            return 0
        self._next = self.clock() + EXAMINE_EVERY.total_seconds()
        started = 0
        try:
            for device_id, attempt in await self.records.failures_to_diagnose(self.job_no):
                if (device_id, attempt) not in self._asked:
                    await self._ask(self.flows, device_id, attempt)
                    self._asked.add((device_id, attempt))
                    started += 1
        except (RPCError, psycopg.Error, PoolTimeout) as error:  # nobody waits for it; the next look asks again
            log.warning("cannot ask devices about their failure", job_no=self.job_no, reason=str(error)[:200])
            return started
        self._failed = failed or 0
        return started

    async def _ask(self, flows: DiagnosticFlows, device_id: str, attempt: int) -> None:
        for what in AUTOMATIC_TYPES:
            await flows.start_diagnosis(
                AskDeviceInput(
                    device_id=device_id,
                    request_id=automatic_request_id(self.job_no, device_id, attempt, what),
                    type=what,
                    lines=LOG_LINES if what is DiagnosticType.LOG_TAIL else None,
                    actor="tidegate",
                    reason="its update has failed",
                    job_no=self.job_no,
                    execution_number=attempt,
                )
            )
