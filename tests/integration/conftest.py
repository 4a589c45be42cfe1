"""Fixtures: a Temporal that keeps its clock, certificate authorities, the enrolment server, a receiver of notifications."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from temporalio.client import Client

from store.engine import Database
from tests.integration.enrolment_setup import Door, Pki, serving, working
from tests.integration.notification_setup import Receiver
from tests.temporal_server import development_server


@pytest_asyncio.fixture(scope="session")
async def temporal() -> AsyncIterator[Client]:
    """A development server for the session."""
    async with development_server() as environment:
        yield environment.client


@pytest_asyncio.fixture
async def pki(db: Database, tmp_path: Path) -> Pki:
    """New authorities."""
    return await Pki.make(db, tmp_path)


@pytest_asyncio.fixture
async def door(db: Database, temporal: Client, pki: Pki) -> AsyncIterator[Door]:
    """The enrolment server, and workers behind it. What runs is ended with the test."""
    async with working(db, temporal, pki), serving(db, temporal, pki) as door:
        yield door


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """One for a test."""
    receiver = Receiver().start()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()
