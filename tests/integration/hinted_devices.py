"""Devices that do nothing until they are told: a publisher in place of the broker, and the gateway's own transactions.

`HintedDevices` takes the notices that drivers publish, as bytes; a device that is told of a job asks to start, and a
moment later reports what its fate says. A device that nobody tells stays silent for ever, so a rollout that ends shows
that everyone was told.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import orjson

from domain.ledger_rows import Report
from models.protocol import ExecutionState
from store.executions import ExecutionStore
from tests.integration.rollout_setup import NEW

SUCCESS = (ExecutionState.SUCCEEDED, {"version": "1.3.0", "sha256": NEW, "slot": "b", "via": "delta"})
FAILURE = (ExecutionState.FAILED, {"failure": "rolled-back", "reason": "fell back"})
Fate = tuple[ExecutionState, dict[str, str]] | None
"""What a device reports; None: nothing more is heard of it."""


@dataclass
class HintedDevices:
    """See the module. `fate` says what becomes of a device; `seconds` how long its update takes."""

    executions: ExecutionStore
    fate: Callable[[str], Fate] = lambda _thing: SUCCESS
    seconds: float = 0.02
    told: Counter[str] = field(default_factory=Counter)
    withdrawn: set[str] = field(default_factory=set)
    started: set[str] = field(default_factory=set)
    away: bool = False
    """The broker does not answer."""
    _asking: list[tuple[str, str]] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def publish(self, topic: str, payload: bytes) -> None:
        """What a driver says to a device."""
        if self.away:
            raise OSError("the broker does not answer")
        thing, kind = topic.split("/")[2], topic.rsplit("/", 1)[1]
        if kind != "notify-next":
            return
        execution = orjson.loads(payload).get("execution")
        if execution is None:
            self.withdrawn.add(thing)
            return
        assert (execution["thingName"], execution["status"]) == (thing, "QUEUED")
        self.told[thing] += 1
        self._asking.append((thing, execution["jobId"]))
        if len(self._asking) == 1:
            self._later(0.002, self._ask())

    async def _ask(self) -> None:
        asking, self._asking = dict(self._asking), []
        admitted = []
        async with self.executions.batch(list(asking)) as batch:
            for thing in asking:
                pending = batch.ledger.pending_of(thing)
                if (
                    pending
                    and pending[0].state is ExecutionState.QUEUED
                    and batch.ledger.admit(pending[0], batch.now, {"step": "accepted"}) is None
                ):
                    admitted.append(thing)
        self.started.update(admitted)
        fates = {thing: fate for thing in admitted if (fate := self.fate(thing)) is not None}
        if fates:
            self._later(self.seconds, self._report([(asking[thing], thing) for thing in fates], fates))

    async def _report(
        self, keys: list[tuple[str, str]], fates: dict[str, tuple[ExecutionState, dict[str, str]]]
    ) -> None:
        async with self.executions.batch([thing for _, thing in keys], keys) as batch:
            for job_id, thing in keys:
                batch.ledger.report(batch.ledger.find(job_id, thing), Report(*fates[thing]), batch.now)

    def _later(self, seconds: float, work: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            await asyncio.sleep(seconds)
            await work

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settle(self) -> None:
        """Wait until nobody is about to do anything."""
        while self._tasks:
            await asyncio.gather(*self._tasks)
