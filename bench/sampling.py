"""What processes cost: CPU from counters of the kernel, memory by sampling.

CPU of a piece is that of all its processes and of those that have ended and been collected by their parent, so that a
database session that came and went counts. Memory is the proportional set size (PSS): a page that several processes
share is counted once between them, or PostgreSQL's shared buffers would count once per session. Where the kernel does
not tell it, the resident set is taken.
"""

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

INTERVAL_SECONDS = 0.5
MIB = 1024 * 1024

Pieces = Callable[[], dict[str, list[int]]]
"""Process ids by piece, asked anew at every sample."""


def cpu_seconds(pids: list[int]) -> float:
    """CPU time that these processes and their collected children have used so far."""
    total = 0.0
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def memory_bytes(pids: list[int]) -> int:
    """Memory of these processes now."""
    total = 0
    for pid in pids:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            total += _memory_of(pid)
    return total


def _memory_of(pid: int) -> int:
    with suppress(FileNotFoundError, PermissionError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process(pid).memory_info().rss)


def machine_cpu_seconds() -> float:
    """CPU time that all programs of this machine have used so far."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "steal", 0.0))


class Sampler:
    """Measures between `async with` and its end; `cpu` and `peak_mib` hold the result by piece.

    `others_share` is the part of the machine that programs which are not measured have used: a figure taken beside a
    busy neighbour says little.
    """

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._peak: dict[str, int] = {}
        self.cpu: dict[str, float] = {}
        self.seconds = 0.0
        self.others_share = 0.0

    @property
    def peak_mib(self) -> dict[str, float]:
        """Largest memory seen."""
        return {name: size / MIB for name, size in self._peak.items()}

    async def __aenter__(self) -> "Sampler":
        self._before = {name: cpu_seconds(pids) for name, pids in self._pieces().items()}
        self._machine_before = machine_cpu_seconds() - cpu_seconds([os.getpid()])
        self._began = time.monotonic()
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._began
        self.cpu = {name: cpu_seconds(pids) - self._before.get(name, 0.0) for name, pids in self._pieces().items()}
        others = machine_cpu_seconds() - cpu_seconds([os.getpid()]) - self._machine_before - sum(self.cpu.values())
        self.others_share = max(0.0, others / (self.seconds * (os.cpu_count() or 1)))
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._measure_memory()

    async def _watch(self) -> None:
        while True:
            self._measure_memory()
            await asyncio.sleep(INTERVAL_SECONDS)

    def _measure_memory(self) -> None:
        for name, pids in self._pieces().items():
            self._peak[name] = max(self._peak.get(name, 0), memory_bytes(pids))
