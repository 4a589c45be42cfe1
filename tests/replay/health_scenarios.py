"""Scenarios of the workflows of health; see tests/replay/life_scenarios.py, which takes them up."""

from collections.abc import Awaitable, Callable
from typing import Any

from temporalio.client import WorkflowHandle
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from models.health import KeepHistoryInput, SweepOfflineInput
from tests.workflow.scripted_health import ScriptedHealth
from workflows import options
from workflows.offline import OfflineSweepWorkflow
from workflows.retention import RetentionWorkflow
from workflows.sandbox import runner

Scenario = Callable[[WorkflowEnvironment], Awaitable[WorkflowHandle[Any, Any]]]


def _played(workflow: Any, asked: Any, name: str, listening: bool = True) -> Scenario:
    async def play(environment: WorkflowEnvironment) -> WorkflowHandle[Any, Any]:
        script = ScriptedHealth(listening=listening)
        async with Worker(
            environment.client,
            task_queue=options.TASK_QUEUE,
            workflows=[workflow],
            activities=[script.sweep_offline, script.keep_history],
            workflow_runner=runner(),
        ):
            handle = await environment.client.start_workflow(
                workflow.run, asked, id=f"recorded-{name}", task_queue=options.TASK_QUEUE
            )
            await handle.result()
        return handle

    return play


HEALTH: dict[str, dict[str, Scenario]] = {
    "OfflineSweepWorkflow": {
        "swept": _played(OfflineSweepWorkflow, SweepOfflineInput(), "swept"),
        "deaf": _played(OfflineSweepWorkflow, SweepOfflineInput(), "deaf", listening=False),
    },
    "RetentionWorkflow": {"kept": _played(RetentionWorkflow, KeepHistoryInput(), "kept")},
}
