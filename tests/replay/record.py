"""`python -m tests.replay.record`: saves histories of all workflows, one file per workflow and scenario.

Run it when a release is made, with a new prefix; never to make a failing replay pass: a saved history that no longer
replays is a rollout in the field that a deployment would wedge. So a file that exists is left as it is.

Most scenarios run on the time-skipping server; those of tests.replay.scenarios on the real one. Those of devices' lives
are tests.replay.life_scenarios', and are named `<Workflow>/<scenario>`.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from temporalio.testing import WorkflowEnvironment

from models.rollout import (
    AbortRolloutInput,
    DriveMode,
    DriveWaveInput,
    PauseRolloutInput,
    Phase,
    PromoteRolloutInput,
    ResumeRolloutInput,
)
from tests.replay.life_scenarios import LIVES
from tests.replay.scenarios import REAL
from tests.temporal_server import development_server
from tests.workflow.conftest import NO_SOAK, THREE_WAVES, SkippingServers, Stage
from tests.workflow.scripted import ScriptedRollout
from tests.workflow.test_rollout_process import HALT, HOLD
from workflows.rollout import RolloutWorkflow

RELEASE = "0.1.0"
HISTORIES = Path(__file__).parent / "histories"
ANONYMOUS = {"identity": "recorder", "lastWorkerIdentity": "recorder", "stackTrace": ""}
"""Fields that tell of the machine a history was recorded on (host, paths), and what stands there instead."""


async def success(stage: Stage) -> None:
    await stage.start(THREE_WAVES, name="recorded-success")


async def no_soak(stage: Stage) -> None:
    await stage.start(NO_SOAK, name="recorded-no-soak")


async def halted(stage: Stage) -> None:
    stage.script.script(1, DriveMode.ANSWERING, HALT)
    await stage.start(THREE_WAVES, name="recorded-halted")


async def halted_in_soak(stage: Stage) -> None:
    stage.script.script(1, DriveMode.SOAKING, HALT)
    await stage.start(THREE_WAVES, name="recorded-halted-in-soak")


async def held_promoted(stage: Stage) -> None:
    stage.script.script(2, DriveMode.ANSWERING, HOLD)
    await stage.start(name="recorded-held-promoted")
    await stage.until(Phase.HOLDING)
    await stage.handle.execute_update(RolloutWorkflow.promote, PromoteRolloutInput(actor="bob", reason="seen"))


async def paused(stage: Stage) -> None:
    stage.script.script(2, DriveMode.ANSWERING, HOLD)
    await stage.start(name="recorded-paused")
    await stage.until(Phase.HOLDING)
    await stage.handle.execute_update(RolloutWorkflow.pause, PauseRolloutInput(actor="bob"))
    await stage.handle.execute_update(RolloutWorkflow.resume, ResumeRolloutInput(actor="bob"))
    await stage.handle.execute_update(RolloutWorkflow.promote, PromoteRolloutInput(actor="bob"))


async def aborted(stage: Stage) -> None:
    stage.script.script(1, DriveMode.ANSWERING, HOLD)
    await stage.start(name="recorded-aborted")
    await stage.until(Phase.HOLDING)
    await stage.handle.execute_update(RolloutWorkflow.abort, AbortRolloutInput(actor="bob", reason="wrong image"))


async def refused(stage: Stage) -> None:
    stage.script.plan_errors.append(("NotFoundError", "cannot start rollout x: no release motor@1.3.0"))
    await stage.start(name="recorded-refused")


SCENARIOS: dict[str, Callable[[Stage], Awaitable[None]]] = {
    "success": success,
    "no-soak": no_soak,
    "halted": halted,
    "halted-in-soak": halted_in_soak,
    "held-promoted": held_promoted,
    "paused": paused,
    "aborted": aborted,
    "refused": refused,
}


async def record(environment: WorkflowEnvironment, scenario: str) -> list[Path]:
    """Run one scenario; save the rollout's history and those of the waves it opened. Returns the files written."""
    stage = Stage(environment, ScriptedRollout())
    await stage.start_workers()
    await (SCENARIOS | REAL)[scenario](stage)
    await stage.result()
    saved = [save("RolloutWorkflow", scenario, (await stage.handle.fetch_history()).to_json())]
    opened = sorted({asked.wave for asked in stage.script.only(DriveWaveInput)})
    for wave in opened:
        history = await stage.wave(wave).fetch_history()
        saved.append(save("WaveWorkflow", f"{scenario}-wave-{wave}", history.to_json()))
    await stage.stop_workers()
    return [path for path in saved if path is not None]


async def record_life(environment: WorkflowEnvironment, workflow: str, scenario: str) -> Path | None:
    """Run one scenario of a device's life, and save its history. None: it exists, and is kept."""
    ended = await LIVES[workflow][scenario](environment)
    return save(workflow, scenario, (await ended.fetch_history()).to_json())


def save(workflow: str, scenario: str, history: str) -> Path | None:
    """Write one history, without what tells of the machine it was recorded on. None: it exists, and is kept."""
    path = HISTORIES / workflow / f"{RELEASE}-{scenario}.json"
    if path.exists():
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_anonymous(json.loads(history)), indent=1) + "\n")
    return path


def _anonymous(value: object) -> object:
    if isinstance(value, dict):
        return {key: ANONYMOUS[key] if key in ANONYMOUS else _anonymous(item) for key, item in value.items()}
    return [_anonymous(item) for item in value] if isinstance(value, list) else value


async def main(wanted: list[str]) -> None:
    """Record the scenarios named, or all."""
    lives = [(workflow, scenario) for workflow, scenarios in LIVES.items() for scenario in scenarios]
    names = wanted or [*SCENARIOS, *REAL, *("/".join(life) for life in lives)]
    servers = SkippingServers()
    for scenario in (name for name in names if name in SCENARIOS):
        for path in await record(await servers.get(), scenario):
            print(path.relative_to(HISTORIES))
    for workflow, scenario in (life for life in lives if "/".join(life) in names):
        path = await record_life(await servers.get(), workflow, scenario)
        if path is not None:
            print(path.relative_to(HISTORIES))
    await servers.discard()
    async with development_server() as environment:
        for scenario in (name for name in names if name in REAL):
            for path in await record(environment, scenario):
                print(path.relative_to(HISTORIES))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
