"""The sandbox notices a decision that is not a function of its arguments; passed through, it would not."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from temporalio.worker import Worker
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner

from tests.workflow.careless_flows import AsksTheClock, ImportsInPassing
from tests.workflow.conftest import SkippingServers, why_it_hangs
from workflows.sandbox import runner


async def outcome(servers: SkippingServers, flow: Any, sandbox: SandboxedWorkflowRunner) -> str:
    """The result of a workflow, or why its first task failed."""
    client = (await servers.get()).client
    async with Worker(client, task_queue="careless", workflows=[flow], workflow_runner=sandbox):
        handle = await client.start_workflow(flow.run, id=f"careless-{id(sandbox)}", task_queue="careless")
        for _ in range(200):
            said = await why_it_hangs(handle)
            if "FAILED" in said or "EXECUTION_COMPLETED" in said:
                break
            await asyncio.sleep(0.02)
    await servers.discard()
    return said


async def test_a_decision_that_asks_the_clock_fails_loudly(servers: SkippingServers) -> None:
    assert "Cannot access datetime.datetime.now" in await outcome(servers, AsksTheClock, runner())


async def test_passed_through_the_same_decision_is_silently_allowed(servers: SkippingServers) -> None:
    """The mutant: what would happen if `domain` stood in the list of what is passed through."""
    rules = runner().restrictions
    lax = SandboxedWorkflowRunner(restrictions=rules.with_passthrough_modules("tests.workflow.careless"))
    assert "EXECUTION_COMPLETED" in await outcome(servers, AsksTheClock, lax)


async def test_a_module_that_is_imported_in_passing_is_an_error(servers: SkippingServers) -> None:
    assert "was not intentionally passed through" in await outcome(servers, ImportsInPassing, runner())


async def test_without_the_policy_the_import_goes_unnoticed(servers: SkippingServers) -> None:
    """The mutant."""
    silent = replace(runner().restrictions, passthrough_all_modules=True)
    said = await outcome(servers, ImportsInPassing, SandboxedWorkflowRunner(restrictions=silent))
    assert "EXECUTION_COMPLETED" in said


@pytest.mark.parametrize("module", ["domain", "domain.gate", "domain.verdicts", "workflows.details"])
def test_decisions_are_never_passed_through(module: str) -> None:
    parts = module.split(".")
    prefixes = {".".join(parts[: n + 1]) for n in range(len(parts))}
    assert not prefixes & runner().restrictions.passthrough_modules
