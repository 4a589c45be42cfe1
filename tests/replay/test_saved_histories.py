"""Every saved history replays on today's workflows; a workflow that asks in another order does not."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from temporalio import workflow
from temporalio.client import WorkflowHistory
from temporalio.common import RawValue
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.worker import Replayer

from models.rollout import RunWaveInput, RunWaveResult, StartRolloutInput
from tests.replay.life_scenarios import LIVES
from tests.replay.record import SCENARIOS
from tests.replay.scenarios import REAL
from workers.lifecycle import LIFECYCLE_WORKFLOWS
from workers.queues import HEALTH_WORKFLOWS
from workflows.fleet_job import FleetJobWorkflow
from workflows.notification import NotificationWorkflow
from workflows.provisioning import ProvisioningWorkflow
from workflows.reissue import ReissueCertificateWorkflow
from workflows.rollout import RolloutWorkflow
from workflows.sandbox import runner
from workflows.wave import WaveWorkflow

HISTORIES = Path(__file__).parent / "histories"
ALL = (
    RolloutWorkflow,
    WaveWorkflow,
    FleetJobWorkflow,
    ProvisioningWorkflow,
    ReissueCertificateWorkflow,
    NotificationWorkflow,
    *LIFECYCLE_WORKFLOWS,
    *HEALTH_WORKFLOWS,
)
SAVED = sorted(HISTORIES.glob("*/*.json"))


def replayer(*workflows: type) -> Replayer:
    return Replayer(workflows=list(workflows), workflow_runner=runner(), data_converter=pydantic_data_converter)


def history(path: Path) -> WorkflowHistory:
    return WorkflowHistory.from_json(f"saved:{path.stem}", path.read_text())


def test_there_are_histories_of_both_workflows_for_every_way_to_end() -> None:
    names = {path.stem.removeprefix("0.1.0-") for path in SAVED if path.parent.name == "RolloutWorkflow"}
    assert names >= {"success", "no-soak", "halted", "halted-in-soak", "held-promoted", "paused", "aborted", "refused"}
    assert sum(path.parent.name == "WaveWorkflow" for path in SAVED) >= 8


@pytest.mark.parametrize("path", SAVED, ids=lambda path: f"{path.parent.name}/{path.stem}")
async def test_a_saved_history_replays(path: Path) -> None:
    await replayer(*ALL).replay_workflow(history(path))


@workflow.defn(name="WaveWorkflow", sandboxed=False)
class SleepyWave:
    """A wave that was changed to wait before it drives: what a deployment must not do to one that runs."""

    @workflow.run
    async def run(self, asked: RunWaveInput) -> RunWaveResult:
        await workflow.sleep(1)
        raise NotImplementedError


@workflow.defn(name="RolloutWorkflow", sandboxed=False)
class SleepyRollout:
    """The same of a rollout."""

    @workflow.run
    async def run(self, asked: StartRolloutInput) -> None:
        await workflow.sleep(1)


@workflow.defn(dynamic=True, sandboxed=False)
class SleepyLife:
    """The same of any other."""

    @workflow.run
    async def run(self, asked: Sequence[RawValue]) -> None:
        await workflow.sleep(1)


@pytest.mark.parametrize("path", SAVED, ids=lambda path: f"{path.parent.name}/{path.stem}")
async def test_a_changed_order_of_steps_does_not_replay(path: Path) -> None:
    with pytest.raises(workflow.NondeterminismError):
        await replayer(SleepyRollout, SleepyWave, SleepyLife).replay_workflow(history(path))


@pytest.mark.parametrize("path", SAVED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_saved_history_tells_nothing_of_the_machine_it_was_recorded_on(path: Path) -> None:
    fields = re.findall(r'"(identity|lastWorkerIdentity|stackTrace)": "([^"]*)"', path.read_text())
    assert {value for _, value in fields} <= {"recorder", ""}


def test_every_scenario_has_its_histories() -> None:
    names = {path.stem.removeprefix("0.1.0-") for path in SAVED if path.parent.name == "RolloutWorkflow"}
    assert names == {*SCENARIOS, *REAL}


def test_every_way_for_a_lifecycle_workflow_to_end_has_its_history() -> None:
    for name, scenarios in LIVES.items():
        saved = {path.stem.removeprefix("0.1.0-") for path in SAVED if path.parent.name == name}
        assert saved == set(scenarios), name
