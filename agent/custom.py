"""Custom operations by a program of the device's own: the task's payload on its standard input, its exit status the result.

The program is started directly, never through a shell, and only for tasks that the order key has signed. What it prints
last is reported, bounded; after `timeout_seconds` it is killed with all it has started.
"""

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson

from agent.errors import TaskError
from firmware.task import Task
from models.protocol import FailureClass

MAX_OUTPUT_BYTES = 600
"""Of what the program prints, the end; a detail of a report may have 1024 characters."""


@dataclass(frozen=True, slots=True)
class Program:
    """See the module. Job id and attempt are in TIDEGATE_JOB_ID and TIDEGATE_ATTEMPT."""

    path: Path
    timeout_seconds: float = 300.0

    async def __call__(self, task: Task) -> Mapping[str, str]:
        """Run it. Raises TaskError."""
        environment = os.environ | {"TIDEGATE_JOB_ID": task.job_id, "TIDEGATE_ATTEMPT": str(task.attempt)}
        try:
            # A file and no pipe: a program need not read, and uvloop takes writing to one that has ended for a mistake.
            with tempfile.TemporaryFile() as document:
                document.write(orjson.dumps(task.payload))
                document.seek(0)
                process = await asyncio.create_subprocess_exec(
                    str(self.path),
                    stdin=document,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise TaskError(
                FailureClass.INTERNAL, f"{self.path} cannot be started: {error.strerror or error}"
            ) from error
        try:
            async with asyncio.timeout(self.timeout_seconds):
                output = await _end_of_output(process)
                status = await process.wait()
        except TimeoutError as error:
            raise TaskError(
                FailureClass.INTERNAL, f"{self.path.name} had not ended after {self.timeout_seconds:g} s"
            ) from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(asyncio.CancelledError):
                await process.wait()
        if status != 0:
            raise TaskError(FailureClass.INTERNAL, f"{self.path.name} ended with {status}: {output}".rstrip(": "))
        return {"output": output} if output else {}


async def _end_of_output(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    kept = b""
    while piece := await process.stdout.read(4096):
        kept = (kept + piece)[-MAX_OUTPUT_BYTES:]
    return kept.decode(errors="replace").replace("\0", "\ufffd").strip()
