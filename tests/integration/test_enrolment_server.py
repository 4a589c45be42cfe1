"""The enrolment server as a device meets it: real TLS, PostgreSQL and Temporal; what it gives, and what it refuses."""

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.testing import WorkflowEnvironment

from models.errors import NotFoundError
from models.identity import DeviceHappening, ProvisionOutcome
from pki.pkcs7 import read_certs_only
from store.engine import Database
from tests.integration.enrolment_setup import (
    CACERTS,
    CONFIRM,
    ENROLL,
    PKCS10,
    REENROLL,
    Door,
    Pki,
    body_for,
    certificate_of,
    column,
    new_key,
    request_for,
    serving,
    tell,
    value,
    working,
)
from tests.workflow.conftest import BINARIES
from workflows.client import register_search_attributes


@pytest_asyncio.fixture(scope="module")
async def temporal() -> AsyncIterator[Client]:
    async with await WorkflowEnvironment.start_local(
        data_converter=pydantic_data_converter,
        dev_server_existing_path=str(BINARIES / "temporal"),
        dev_server_log_level="error",
    ) as environment:
        await register_search_attributes(environment.client)
        yield environment.client


@pytest_asyncio.fixture
async def pki(db: Database, tmp_path: Path) -> Pki:
    return await Pki.make(db, tmp_path)


@pytest_asyncio.fixture
async def door(db: Database, temporal: Client, pki: Pki) -> AsyncIterator[Door]:
    async with working(db, temporal, pki), serving(db, temporal, pki) as door:
        yield door


async def test_a_device_enrols_connects_is_configured_and_becomes_active(
    door: Door, db: Database, pki: Pki, temporal: Client
) -> None:
    claim = door.client(await pki.batch(db, config={"interval": 5}, id_prefix="motor-", tags={"line": "4"}))
    key = new_key()
    answer = await claim.post(ENROLL, content=body_for("SN0017", key), headers=PKCS10)
    certificate = certificate_of(answer)
    assert answer.headers["content-transfer-encoding"] == "base64"
    assert [a.value for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == ["motor-SN0017"]
    assert await value(db, "SELECT status FROM devices") == "provisioning"
    assert await value(db, "SELECT desired_config FROM devices") == {"interval": 5}

    await tell(db, "motor-SN0017", DeviceHappening.CONNECTED)
    await tell(db, "motor-SN0017", DeviceHappening.CONFIGURED, version=1)
    await asyncio.sleep(0.5)
    assert await value(db, "SELECT status FROM devices") == "configured"
    await tell(db, "motor-SN0017", DeviceHappening.HEARTBEAT)
    handle = temporal.get_workflow_handle("provision:SN0017")
    result = await handle.result()
    assert result["outcome"] == ProvisionOutcome.ACTIVE
    assert await value(db, "SELECT status FROM devices") == "active"
    assert await value(db, "SELECT state FROM enrolments") == "active"
    assert await value(db, "SELECT count(*) FROM device_waits") == 0
    events = len((await handle.fetch_history()).events)
    print("history events:", events)
    assert events <= 45
