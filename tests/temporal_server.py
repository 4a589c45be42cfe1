"""Temporal as it is in the field: a development server of its own for the tests of a module or a session."""

import sysconfig
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.testing import WorkflowEnvironment

from workflows.client import register_search_attributes

BINARIES = Path(sysconfig.get_path("scripts"))


@asynccontextmanager
async def development_server(**settings: Any) -> AsyncIterator[WorkflowEnvironment]:
    """A server that knows Tidegate's search attributes; `settings` are those of `WorkflowEnvironment.start_local`."""
    async with await WorkflowEnvironment.start_local(
        data_converter=pydantic_data_converter,
        dev_server_existing_path=str(BINARIES / "temporal"),
        dev_server_log_level="error",
        **settings,
    ) as environment:
        await register_search_attributes(environment.client)
        yield environment
