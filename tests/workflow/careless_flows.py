"""Workflows that the sandbox refuses, and the one it cannot: each breaks one rule of workflows.sandbox."""

from temporalio import workflow

from workflows.sandbox import decisions

with decisions():
    from tests.workflow import careless


@workflow.defn
class AsksTheClock:
    """Its decision is imported as `domain` is."""

    @workflow.run
    async def run(self) -> str:
        return careless.decide()


@workflow.defn
class ImportsInPassing:
    """Imports a module that nobody passed through on purpose."""

    @workflow.run
    async def run(self) -> str:
        import tests.workflow.scripted as scripted

        return scripted.__name__
