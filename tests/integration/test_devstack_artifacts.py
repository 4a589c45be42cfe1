"""The artifact server, over a real socket: ranges, conditions, and names that are no artifact."""

import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from devstack.artifacts import ArtifactServer
from devstack.state import StateDirectory
from devstack.supervisor import Supervisor

DATA = bytes(range(256)) * 4096
NAME = hashlib.sha256(DATA).hexdigest()


@pytest_asyncio.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a running server that has one artifact, beside files that are none."""
    folder = tmp_path_factory.mktemp("artifacts")
    state = StateDirectory(folder / "state")
    store = state.folder("store")
    (store / "artifacts").mkdir()
    (store / "artifacts" / NAME).write_bytes(DATA)
    (store / "secret").write_text("secret")
    (store / "artifacts" / "not-a-hash").write_text("secret")
    (store / "artifacts" / ("d" * 64)).mkdir()
    (store / "artifacts" / ("e" * 64)).symlink_to(store / "secret")
    piece = ArtifactServer(state, store.as_uri())
    supervisor = Supervisor(state)
    await supervisor.start(piece)
    async with httpx.AsyncClient(base_url=piece.address, trust_env=False) as client:
        yield client
    await supervisor.stop_all()


async def test_an_artifact_is_served_whole_uncompressed_and_for_ever(server: httpx.AsyncClient) -> None:
    answer = await server.get(f"/artifacts/{NAME}", headers={"accept-encoding": "gzip"})
    assert (answer.status_code, answer.content) == (200, DATA)
    assert answer.headers["etag"] == f'"{NAME}"'
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert "content-encoding" not in answer.headers
    head = await server.head(f"/artifacts/{NAME}")
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(DATA)), b"")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("bytes=0-0", DATA[:1]),
        ("bytes=1000-", DATA[1000:]),
        ("bytes=-7", DATA[-7:]),
        (f"bytes={len(DATA) - 1}-", DATA[-1:]),
        (f"bytes=10-{10 * len(DATA)}", DATA[10:]),
    ],
)
async def test_a_download_resumes_where_it_stopped(server: httpx.AsyncClient, wanted: str, expected: bytes) -> None:
    answer = await server.get(f"/artifacts/{NAME}", headers={"range": wanted, "if-range": f'"{NAME}"'})
    assert (answer.status_code, answer.content) == (206, expected)
    start = len(DATA) - len(expected) if wanted != "bytes=0-0" else 0
    assert answer.headers["content-range"] == f"bytes {start}-{start + len(expected) - 1}/{len(DATA)}"


async def test_a_resumed_download_of_another_artifact_starts_over(server: httpx.AsyncClient) -> None:
    headers = {"range": "bytes=1000-", "if-range": f'"{"0" * 64}"'}
    answer = await server.get(f"/artifacts/{NAME}", headers=headers)
    assert (answer.status_code, len(answer.content)) == (200, len(DATA))


async def test_a_range_beyond_the_end_is_refused(server: httpx.AsyncClient) -> None:
    answer = await server.get(f"/artifacts/{NAME}", headers={"range": f"bytes={len(DATA)}-"})
    assert answer.status_code == 416


@pytest.mark.parametrize(
    "path",
    [
        b"/artifacts/../secret",
        b"/artifacts/..%2fsecret",
        b"/artifacts/%2e%2e/secret",
        b"/artifacts/%2e%2e%2fsecret",
        b"/artifacts//etc/passwd",
        b"/artifacts/%2fetc%2fpasswd",
        b"/artifacts/not-a-hash",
        b"/artifacts/" + b"d" * 64,
        b"/artifacts/" + b"e" * 64,
        b"/artifacts/" + b"f" * 64,
        b"/artifacts/" + NAME.upper().encode(),
        b"/artifacts/" + NAME.encode() + b"%0a",
        b"/artifacts/" + NAME.encode() + b"%00",
        b"/secret",
        b"/artifacts/",
        b"/",
    ],
)
async def test_no_name_reaches_anything_but_an_artifact(server: httpx.AsyncClient, path: bytes) -> None:
    url = httpx.URL(server.base_url).copy_with(raw_path=path)
    answer = await server.get(url)
    assert answer.status_code == 404
    assert b"secret" not in answer.content and b"root:" not in answer.content


async def test_without_the_check_of_names_the_same_request_reads_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    from devstack import artifacts

    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "not-a-hash").write_text("secret")
    monkeypatch.setattr(artifacts, "SHA256", re.compile(".*"))
    transport = httpx.ASGITransport(artifacts.application(tmp_path))
    async with httpx.AsyncClient(transport=transport, base_url="http://store") as client:
        assert (await client.get("/artifacts/not-a-hash")).text == "secret"


async def test_nothing_can_be_written(server: httpx.AsyncClient) -> None:
    for method in ("PUT", "POST", "DELETE", "PATCH"):
        answer = await server.request(method, f"/artifacts/{NAME}", content=os.urandom(8))
        assert answer.status_code == 405
    assert (await server.get(f"/artifacts/{NAME}")).content == DATA


async def test_its_metrics_count_what_it_served(server: httpx.AsyncClient) -> None:
    await server.get("/artifacts/nothing")
    text = (await server.get("/metrics")).text
    assert 'tidegate_ready{process="artifacts"} 1.0' in text
    assert 'tidegate_artifact_requests_total{status="404"}' in text
