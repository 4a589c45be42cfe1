"""Thousands of devices that carry out fleet jobs over a real broker: lean sessions, real orders, a log of their own.

A device asks when it is told that something waits, verifies the order as an agent does, works for a moment and reports;
it repeats what is not answered. What it has begun and ended, and when by its own clock, is in `log`: nothing of it is
read from the engine's side.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from agent.wire import WireSession
from firmware.keys import TrustedKeys
from firmware.task import verify_task
from models.protocol import jobs_topic

ANSWER_WITHIN_SECONDS = 3.0
"""A request that has no answer by then is sent again."""


@dataclass(frozen=True)
class Worked:
    """One attempt as the device saw it: from the answer that let it begin to the moment it reported the end."""

    device: str
    job_id: str
    attempt: int
    began: float
    ended: float
    succeeded: bool


@dataclass
class JobDevice:
    """One device. `fails(attempt)` says which of its attempts fail."""

    name: str
    trusted: TrustedKeys
    fails: Callable[[int], bool]
    log: list[Worked]
    seconds: float = 0.05
    _session: WireSession | None = None
    _busy: bool = False
    _again: bool = False
    _finished: set[str] = field(default_factory=set)
    _answers: dict[str, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def connect(self, host: str, port: int) -> None:
        """Connect, and hear answers and hints."""
        filters = [jobs_topic(self.name, part) for part in ("notify-next", "start-next/+", "+/update/+")]
        _, session = await asyncio.get_running_loop().create_connection(
            lambda: WireSession(self.name, filters, self._received, lambda: None), host, port
        )
        self._session = session
        await session.ready

    def close(self) -> None:
        """Disconnect."""
        if self._session is not None:
            self._session.close()
        for task in self._tasks:
            task.cancel()

    def _received(self, topic: str, payload: memoryview) -> None:
        body = orjson.loads(payload)
        if topic.endswith("notify-next"):
            if "execution" in body:
                self._wake()
            return
        waiting = self._answers.pop(body.get("clientToken", ""), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(body)

    def _wake(self) -> None:
        if self._busy:
            self._again = True
            return
        self._busy = True
        task = asyncio.create_task(self._serve())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self) -> None:
        try:
            while True:
                self._again = False
                answer = await self._ask("start-next", {})
                execution = answer.get("execution")
                if execution is not None:
                    await self._work(execution, int(answer["timestamp"]))
                elif not self._again:
                    return
        finally:
            self._busy = False

    async def _work(self, execution: dict[str, Any], now: int) -> None:
        began, job_id, attempt = time.monotonic(), execution["jobId"], execution["executionNumber"]
        verified = verify_task(
            execution["jobDocument"]["order"],
            self.trusted,
            self.name,
            frozenset(self._finished),
            now,
            job_id=job_id,
            attempt=attempt,
        )
        assert verified.task.payload.items() <= execution["jobDocument"].items()
        await asyncio.sleep(random.uniform(0.5, 1.5) * self.seconds)
        failed = self.fails(attempt)
        self._finished.add(verified.task.key)
        self.log.append(Worked(self.name, job_id, attempt, began, time.monotonic(), not failed))
        report = {
            "status": "FAILED" if failed else "SUCCEEDED",
            "executionNumber": attempt,
            "statusDetails": {"failure": "internal", "reason": f"attempt {attempt} was to fail"} if failed else {},
        }
        answer = await self._ask(f"{job_id}/update", report)
        assert answer.get("code") in (None, "TerminalStateReached"), answer

    async def _ask(self, what: str, body: dict[str, Any]) -> dict[str, Any]:
        """A request, repeated until it is answered."""
        assert self._session is not None
        while True:
            token = f"{random.getrandbits(60):x}"
            answered = self._answers[token] = asyncio.get_running_loop().create_future()
            self._session.publish(jobs_topic(self.name, what), orjson.dumps({**body, "clientToken": token}))
            try:
                return await asyncio.wait_for(answered, ANSWER_WITHIN_SECONDS)
            except TimeoutError:
                self._answers.pop(token, None)


def most_at_once(log: list[Worked]) -> int:
    """The most attempts that were under way at one moment."""
    moments = sorted([(worked.began, 1) for worked in log] + [(worked.ended, -1) for worked in log])
    running = most = 0
    for _, change in moments:
        running += change
        most = max(most, running)
    return most
