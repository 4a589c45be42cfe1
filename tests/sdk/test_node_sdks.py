"""AWS's device SDKs for Node.js, unmodified, on a real Mosquitto with certificates, a real PostgreSQL and the gateway.

The SDKs are installed by npm into a folder outside this repository, once for all tests here; without Node.js, npm or a
registry that answers, the tests are skipped.
"""

import asyncio
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from models.protocol import Verb
from tests.conftest import mosquitto_binary
from tests.integration.rollout_setup import recount
from tests.sdk.judge import Judge
from tests.sdk.node_judge import (
    SCRIPTS,
    NodeClassic,
    NodeClassic311,
    NodeJudge,
    NodeRequestResponse,
    NodeRequestResponse311,
    NodeV1Jobs,
    NodeV1Shadow,
)
from tests.sdk.round_trips import DONE, live_with_a_shadow, work_through_a_job
from tests.sdk.site import JOB, Site, judging, outlive_outages, site

pytestmark = [
    pytest.mark.skipif(mosquitto_binary() is None, reason="Mosquitto is not installed"),
    pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="Node.js or npm is not installed"),
    pytest.mark.timeout(240),
]
V2: list[type[NodeJudge]] = [NodeRequestResponse, NodeRequestResponse311, NodeClassic, NodeClassic311]
INSTALL_SECONDS = 150


def names(kind: type[Judge]) -> str:
    return kind.__name__


@pytest.fixture(scope="module")
def node_modules() -> Path:
    """The scripts with their SDKs beside them; kept between runs by what package.json says."""
    wanted = (SCRIPTS / "package.json").read_bytes()
    folder = Path(tempfile.gettempdir()) / f"tidegate-node-{hashlib.sha256(wanted).hexdigest()[:16]}"
    if not (folder / "node_modules").is_dir():
        making = Path(tempfile.mkdtemp(prefix="tidegate-node-"))
        shutil.copy(SCRIPTS / "package.json", making)
        command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"]
        try:
            done = subprocess.run(command, cwd=making, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm did not install the SDKs within {INSTALL_SECONDS} s")
        if done.returncode != 0:
            pytest.skip(f"npm cannot install the SDKs: {done.stderr.strip()[-300:]}")
        if not folder.exists():
            making.rename(folder)
    for script in SCRIPTS.glob("*.js"):
        shutil.copy(script, folder)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def place(database_url: str, tmp_path_factory: pytest.TempPathFactory, node_modules: Path) -> AsyncIterator[Site]:
    NodeJudge.modules = node_modules
    async with site(database_url, tmp_path_factory.mktemp("node"), 20) as made:
        yield made


@pytest.mark.parametrize("kind", V2, ids=names)
async def test_an_sdk_takes_a_job_from_hint_to_end(place: Site, kind: type[Judge]) -> None:
    loop = asyncio.get_running_loop()
    async with judging(place, kind) as judge:

        def offer() -> None:
            asyncio.run_coroutine_threadsafe(place.offer(judge.thing), loop).result(20)

        await asyncio.to_thread(work_through_a_job, judge, offer)


@pytest.mark.parametrize("kind", [*V2, NodeV1Shadow], ids=names)
async def test_an_sdk_keeps_a_shadow(place: Site, kind: type[Judge]) -> None:
    named = ("door",) if kind.named else ()
    async with judging(place, kind, "", *named) as judge:
        for shadow in ("", *named):
            await asyncio.to_thread(live_with_a_shadow, judge, shadow)


@pytest.mark.parametrize("kind", [NodeRequestResponse, NodeRequestResponse311], ids=names)
async def test_an_sdk_is_answered_after_the_gateway_was_killed_and_after_the_broker_was(
    place: Site, kind: type[Judge]
) -> None:
    async with judging(place, kind) as judge:
        await outlive_outages(place, judge)


async def test_the_first_sdk_gives_a_job_to_its_subscriber_and_reports_its_end(place: Site) -> None:
    async with judging(place, NodeV1Jobs) as judge:
        assert isinstance(judge, NodeV1Jobs)
        await asyncio.to_thread(judge.ask, "start-notifications")
        job = await asyncio.to_thread(judge.events.next, "job")
        assert (job["jobId"], job["operation"], job["status"]["status"]) == (JOB, "firmware-update", "QUEUED")
        await asyncio.to_thread(
            judge.ask, Verb.UPDATE, {"status": "IN_PROGRESS", "statusDetails": {"step": "accepted"}}
        )
        await asyncio.to_thread(judge.ask, "start-notifications")
        job = await asyncio.to_thread(judge.events.next, "job")
        assert job["status"] == {"status": "IN_PROGRESS", "statusDetails": {"step": "accepted"}}
        assert {"release", "order"} <= job["document"].keys()
        await asyncio.to_thread(judge.ask, Verb.UPDATE, DONE)
        async with asyncio.timeout(10), place.stage.db.pool.connection() as connection:
            while True:
                row = await (
                    await connection.execute("SELECT state FROM executions WHERE device_id = %s", (judge.thing,))
                ).fetchone()
                await connection.commit()
                if row == ("SUCCEEDED",):
                    break
                await asyncio.sleep(0.05)
    assert await recount(place.stage.db, place.fleet.plan.job_no) == []
