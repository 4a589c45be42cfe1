"""Making a delta in a process of its own, which may be killed and cannot take the worker with it.

A process for each delta rather than a pool: one that is killed by a limit would break the pool and fail its neighbours.
"""

import asyncio
import signal
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from activities.delta_process import REFUSED
from models.errors import RefusedError

ROOT = Path(__file__).parent.parent


class DeltaNotBuiltError(RefusedError):
    """There is no delta for these images, and the message says why.

    `lasting`: it lies in the images, so that another attempt would end the same way; else in the machine or the store.
    """

    def __init__(self, reason: str, *, lasting: bool) -> None:
        super().__init__(reason)
        self.lasting = lasting


@dataclass(frozen=True)
class DeltaBuilder:
    """Limits of one build. bsdiff4 takes 17 times the old image: 272 MiB at the codec's limit, and Python's own share."""

    memory_bytes: int = 768 * 2**20
    processor_time: timedelta = timedelta(minutes=5)
    deadline: timedelta = timedelta(minutes=10)
    """Of the clock on the wall: for a process that is stopped, or starved by its neighbours."""

    async def build(self, codec: str, base: bytes, target: bytes) -> bytes:
        """A verified delta. Raises DeltaNotBuiltError with the reason; cancelled, it ends the process."""
        try:
            with tempfile.TemporaryDirectory(prefix="tidegate-delta-") as folder:
                paths = [Path(folder, name) for name in ("base", "target", "patch")]
                await asyncio.to_thread(_write, paths, (base, target))
                await self._run(codec, paths)
                return await asyncio.to_thread(paths[2].read_bytes)
        except OSError as error:
            raise DeltaNotBuiltError(f"this machine could not: {error}", lasting=False) from error

    async def _run(self, codec: str, paths: list[Path]) -> None:
        process = await self._start(codec, paths)
        try:
            async with asyncio.timeout(self.deadline.total_seconds()):
                said, _ = await process.communicate()
        except TimeoutError as error:
            seconds = self.deadline.total_seconds()
            raise DeltaNotBuiltError(f"not ready after {seconds:.0f} s", lasting=False) from error
        finally:
            await _end(process)
        if process.returncode:
            raise self._failure(process.returncode, said.decode(errors="replace").strip())

    async def _start(self, codec: str, paths: list[Path]) -> Process:
        limits = (str(self.memory_bytes), str(max(1, round(self.processor_time.total_seconds()))))
        command = (sys.executable, "-m", "activities.delta_process", codec, *map(str, paths), *limits)
        return await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL)

    def _failure(self, status: int, said: str) -> DeltaNotBuiltError:
        if status == REFUSED:
            return DeltaNotBuiltError(said[:500], lasting=True)
        if status == -signal.SIGXCPU:
            seconds = self.processor_time.total_seconds()
            return DeltaNotBuiltError(f"takes more than {seconds:.0f} s of processor time", lasting=True)
        return DeltaNotBuiltError(f"the process that makes it ended with status {status}", lasting=False)


def _write(paths: list[Path], images: tuple[bytes, bytes]) -> None:
    for path, image in zip(paths, images, strict=False):
        path.write_bytes(image)


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()
