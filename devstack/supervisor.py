"""Keeps pieces running: starts them and waits until each answers, restarts what crashes, stops all in reverse.

A piece that ends by itself is started again after a pause that doubles from half a second to thirty; one that has run
for a minute starts over with the shortest. What was killed or stopped on purpose stays down until it is started again.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from devstack.interface import Piece
from devstack.process import ManagedProcess
from devstack.state import StateDirectory
from models.errors import TidegateError, UnavailableError

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, STEADY_SECONDS = 0.5, 30.0, 60.0
_WATCH_SECONDS = 0.1
_PROBE_SECONDS = 0.05
_LOG_TAIL_CHARACTERS = 1500

log: Any = structlog.get_logger("stack")


@dataclass(frozen=True)
class PieceEvent:
    """Something happened to a piece: `kind` is started, ended, restarted or stopped."""

    piece: Piece
    kind: str
    text: str


class Supervisor:
    """Runs pieces. Not for several event loops."""

    def __init__(self, state: StateDirectory, listener: Callable[[PieceEvent], None] | None = None) -> None:
        self._state = state
        self._listener = listener
        self._pieces: dict[str, Piece] = {}
        self._processes: dict[str, ManagedProcess] = {}
        self._wanted: set[str] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._restarts: dict[str, asyncio.Task[None]] = {}
        self._pauses: dict[str, float] = {}

    async def start(self, *pieces: Piece) -> None:
        """Start these side by side; returns when all of them answer. Raises UnavailableError with the end of a log."""
        try:
            async with asyncio.TaskGroup() as group:
                for piece in pieces:
                    group.create_task(self._start(piece))
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())

    async def start_again(self, name: str) -> None:
        """Start a piece that was killed or stopped; nothing where it runs."""
        if name not in self._processes:
            await self._start(self._pieces[name])

    def kill(self, name: str) -> None:
        """SIGKILL; the piece stays down until `start_again`."""
        self._wanted.discard(name)
        if restart := self._restarts.pop(name, None):
            restart.cancel()
        if process := self._processes.pop(name, None):
            process.kill()
            self._state.record(name, None)
            self._tell(name, "ended", "killed on purpose")

    async def stop(self, name: str) -> None:
        """End a piece politely; it stays down until `start_again`."""
        self._wanted.discard(name)
        if restart := self._restarts.pop(name, None):
            restart.cancel()
        if process := self._processes.pop(name, None):
            await process.stop()
            self._state.record(name, None)
            self._tell(name, "stopped", "stopped")

    async def stop_all(self) -> None:
        """Stop everything, last started first."""
        if self._watcher:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
            self._watcher = None
        for name in reversed(list(self._pieces)):
            await self.stop(name)

    def process(self, name: str) -> ManagedProcess | None:
        """The running process of a piece; None while it is down."""
        return self._processes.get(name)

    @property
    def pieces(self) -> list[Piece]:
        """All that were started, in that order."""
        return list(self._pieces.values())

    async def _start(self, piece: Piece) -> None:
        began = time.monotonic()
        self._pieces[piece.name] = piece
        await asyncio.to_thread(piece.prepare)
        launch = piece.launch()
        process = ManagedProcess(launch, self._state.log(piece.name))
        self._processes[piece.name] = process
        self._state.record(piece.name, process.identity, launch.stop_signal)
        await self._until_it_answers(piece, process)
        await piece.complete()
        self._wanted.add(piece.name)
        self._tell(piece.name, "started", f"answers after {time.monotonic() - began:.1f} s")

    async def _until_it_answers(self, piece: Piece, process: ManagedProcess) -> None:
        deadline = time.monotonic() + piece.ready_seconds
        while process.exit_code is None:
            with contextlib.suppress(OSError, TimeoutError):
                if await asyncio.wait_for(piece.answers(), 5):
                    return
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"{piece.title} did not answer within {piece.ready_seconds:.0f} s at {piece.address}; "
                    f"{_last_words(process)}"
                )
            await asyncio.sleep(_PROBE_SECONDS)
        raise UnavailableError(
            f"{piece.title} ended with {_ending(process.exit_code)} before it answered at {piece.address}; "
            f"{_last_words(process)}"
        )

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            for name in self._wanted - self._restarts.keys():
                if self._processes[name].exit_code is not None:
                    self._restarts[name] = asyncio.create_task(self._restart(name))

    async def _restart(self, name: str) -> None:
        while (process := self._processes[name]).exit_code is not None:
            pause = self._pause_before_restart(name, time.monotonic() - process.started_at)
            self._tell(name, "ended", f"ended with {_ending(process.exit_code)}; starting again in {pause:.1f} s")
            process.end_leftovers()
            await asyncio.sleep(pause)
            try:
                await self._start(self._pieces[name])
            except (TidegateError, OSError) as error:
                log.error("cannot restart", piece=name, reason=str(error))
                await self._processes[name].stop()
        del self._restarts[name]

    def _pause_before_restart(self, name: str, ran_seconds: float) -> float:
        last = self._pauses.get(name)
        if last is None or ran_seconds > STEADY_SECONDS:
            self._pauses[name] = FIRST_PAUSE_SECONDS
        else:
            self._pauses[name] = min(2 * last, LONGEST_PAUSE_SECONDS)
        return self._pauses[name]

    def _tell(self, name: str, kind: str, text: str) -> None:
        piece = self._pieces[name]
        log.info(kind, piece=name, detail=text, address=piece.address)
        if self._listener:
            self._listener(PieceEvent(piece, kind, text))


def _ending(exit_code: int | None) -> str:
    return f"signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"exit status {exit_code}"


def _last_words(process: ManagedProcess) -> str:
    text = process.new_log().strip()
    return f"the end of {process.log}:\n{text[-_LOG_TAIL_CHARACTERS:]}" if text else f"{process.log} says nothing"
