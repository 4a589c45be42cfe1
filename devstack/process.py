"""Running one program of the stack: started by its launcher, logged to a file, ended politely or at once.

Each program leads a session and process group of its own, so that a Ctrl-C in the terminal reaches the supervisor
alone, and so that what a killed program leaves behind (a pool's processes) can be found and ended with it.

Programs are spawned from the main thread only: the kernel's "parent died" signal is tied to the spawning thread.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from devstack.interface import Launch

LAUNCHER = Path(__file__).with_name("launch.py")
LOG_LIMIT_BYTES = 20 * 1024 * 1024
"""A log larger than this is set aside (`.1`) when its program starts again."""
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Identity:
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    started: float

    @classmethod
    def of(cls, pid: int) -> "Identity":
        """The identity of a running process. Raises psutil.NoSuchProcess."""
        return cls(pid, psutil.Process(pid).create_time())

    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        try:
            process = psutil.Process(self.pid)
            # Start times are computed from the boot time, which moves a little when the clock is set.
            return abs(process.create_time() - self.started) < 2 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class ManagedProcess:
    """One run of one program."""

    def __init__(self, launch: Launch, log: Path) -> None:
        """Start the program. Its output is appended to `log`."""
        self.launch = launch
        self.log = log
        if log.exists() and log.stat().st_size > LOG_LIMIT_BYTES:
            log.replace(log.with_suffix(".log.1"))
        command = [
            *(sys.executable, "-I", "-S", str(LAUNCHER)),
            *(str(os.getpid()), str(int(launch.stop_signal)), launch.account or "-"),
            *launch.command,
        ]
        with log.open("ab") as output:
            self.log_offset = output.tell()
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | launch.environment,
                start_new_session=True,
            )
        self.identity = Identity.of(self._popen.pid)
        self.started_at = time.monotonic()

    @property
    def pid(self) -> int:
        """Process id of the program."""
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._popen.poll()

    def pids(self) -> list[int]:
        """The program and everything it started, in no order."""
        if self.exit_code is not None:
            return []
        try:
            return [self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def new_log(self) -> str:
        """What this run has written."""
        with self.log.open("rb") as file:
            file.seek(self.log_offset)
            return file.read().decode(errors="replace")

    def kill(self) -> None:
        """SIGKILL, to the program alone as an operator's `kill -9`; returns when all of its processes are gone."""
        family = [Identity.of(pid) for pid in self.pids() if psutil.pid_exists(pid)]
        self._popen.kill()
        self._popen.wait()
        self.end_leftovers(family)

    def end_leftovers(self, family: list[Identity] | None = None) -> None:
        """End what a dead program left in its process group, then wait for `family` to be gone."""
        kill_group(self.pid)
        wait_until_gone(family or [], 10.0)

    async def stop(self) -> None:
        """Ask politely, and after `stop_seconds` kill."""
        family = [Identity.of(pid) for pid in self.pids() if psutil.pid_exists(pid)]
        if self.exit_code is None:
            self._popen.send_signal(self.launch.stop_signal)
        deadline = time.monotonic() + self.launch.stop_seconds
        while self.exit_code is None and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        if self.exit_code is None:
            self._popen.kill()
            self._popen.wait()
        self.end_leftovers(family)


def kill_group(group: int) -> None:
    """SIGKILL to every process of a group; quietly nothing where there is none."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def wait_until_gone(processes: list[Identity], seconds: float) -> list[Identity]:
    """Wait for processes to end; those that still run when the time is over."""
    deadline = time.monotonic() + seconds
    left = [process for process in processes if process.alive()]
    while left and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        left = [process for process in left if process.alive()]
    return left
