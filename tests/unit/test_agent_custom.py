"""A program that carries out custom tasks, on both event loops that agents run on."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop

from agent.custom import Program

TASK: Any = SimpleNamespace(job_id="_calibrate", attempt=1, payload={"calibrate": {"sensor": 2}})


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize(
    ("script", "output"), [("echo done", "done"), ("cat", '{"calibrate":{"sensor":2}}')], ids=["reads nothing", "reads"]
)
def test_a_program_may_read_its_document_or_not(
    tmp_path: Path, run: Callable[[Any], list[dict[str, str]]], script: str, output: str
) -> None:
    path = tmp_path / "program"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)

    async def many() -> list[Any]:
        return await asyncio.gather(*(Program(path, 30)(TASK) for _ in range(10)))

    assert run(many()) == [{"output": output}] * 10
