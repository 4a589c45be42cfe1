"""AWS's device SDKs for Python, unmodified, on a real Mosquitto with certificates, a real PostgreSQL and the gateway."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.conftest import mosquitto_binary
from tests.sdk.judge import Judge
from tests.sdk.python_v1 import PythonV1
from tests.sdk.python_v2 import Classic, Classic311, RequestResponse, RequestResponse311
from tests.sdk.round_trips import live_with_a_shadow, work_through_a_job
from tests.sdk.site import Site, judging, outlive_outages, site

pytestmark = [
    pytest.mark.skipif(mosquitto_binary() is None, reason="Mosquitto is not installed"),
    pytest.mark.timeout(180),
    # AWSIoTPythonSDK on Python 3.11
    *(
        pytest.mark.filterwarnings(f"ignore:ssl.{name} is deprecated:DeprecationWarning")
        for name in (r"wrap_socket\(\)", r"match_hostname\(\)", "PROTOCOL_TLS", "PROTOCOL_TLSv1_2")
    ),
]
JUDGES: list[type[Judge]] = [RequestResponse, RequestResponse311, Classic, Classic311, PythonV1]
every_judge = pytest.mark.parametrize("kind", JUDGES, ids=lambda kind: kind.__name__)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def place(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with site(database_url, tmp_path_factory.mktemp("sdk"), 4 * len(JUDGES)) as made:
        yield made


@every_judge
async def test_an_sdk_takes_a_job_from_hint_to_end(place: Site, kind: type[Judge]) -> None:
    loop = asyncio.get_running_loop()
    async with judging(place, kind) as judge:

        def offer() -> None:
            asyncio.run_coroutine_threadsafe(place.offer(judge.thing), loop).result(20)

        await asyncio.to_thread(work_through_a_job, judge, offer)


@every_judge
async def test_an_sdk_keeps_a_shadow(place: Site, kind: type[Judge]) -> None:
    named = ("door",) if kind.named else ()
    async with judging(place, kind, "", *named) as judge:
        for shadow in ("", *named):
            await asyncio.to_thread(live_with_a_shadow, judge, shadow)


@every_judge
async def test_an_sdk_is_answered_after_the_gateway_was_killed_and_after_the_broker_was(
    place: Site, kind: type[Judge]
) -> None:
    async with judging(place, kind) as judge:
        await outlive_outages(place, judge)
