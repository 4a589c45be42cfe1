"""Downloads against a server that lies, stalls and breaks off: THREATS rows 14 and 15, on real sockets."""

import asyncio
import gzip
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import httpx
import pytest
import pytest_asyncio

from agent.download import Downloader, DownloadPolicy
from agent.errors import ContentError, DownloadError, FlashError
from tests.agent_flash import Flash
from tests.agent_standin import sha256

DATA = random.Random(14).randbytes(400_000)
DIGEST = sha256(DATA)
QUICK = DownloadPolicy(window_seconds=0.5, overall_seconds=20, fruitless_attempts=2, pause_seconds=0)

Answer = Callable[["Request", asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Request:
    """A request as the server saw it."""

    path: str
    headers: dict[str, str]

    @property
    def start(self) -> int:
        return int(self.headers.get("range", "bytes=0-")[6:-1])


@dataclass
class EvilServer:
    """An HTTP server of a few lines that answers what the test wants."""

    answers: list[Answer] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    port: int = 0

    def url(self, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/artifacts/{DIGEST}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        self.requests.append(Request(head[0].split()[1], headers))
        answer = self.answers[min(len(self.requests), len(self.answers)) - 1]
        try:
            await answer(self.requests[-1], writer)
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


def respond(body: bytes, status: str = "200 OK", length: int | None = None, **headers: str) -> Answer:
    """An answer with these bytes, whatever was asked."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        lines = {"Content-Length": str(len(body) if length is None else length), "Connection": "close"}
        lines |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body)

    return answer


def cut_after(size: int, etag: str = '"v1"') -> Answer:
    """An honest server whose connection breaks after `size` bytes of each answer."""

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        start = request.start
        ranged = start and request.headers.get("if-range") == etag
        body = DATA[start:] if ranged else DATA
        span = f"Content-Range: bytes {start}-{len(DATA) - 1}/{len(DATA)}\r\n" if ranged else ""
        status = "206 Partial Content" if ranged else "200 OK"
        head = f"HTTP/1.1 {status}\r\nETag: {etag}\r\nContent-Length: {len(body)}\r\n{span}\r\n"
        writer.write(head.encode() + body[:size])

    return answer


@pytest_asyncio.fixture
async def server() -> AsyncIterator[EvilServer]:
    evil = EvilServer()
    listener = await asyncio.start_server(evil.serve, "127.0.0.1", 0)
    evil.port = listener.sockets[0].getsockname()[1]
    yield evil
    listener.close()
    await listener.wait_closed()


@dataclass
class CountingFlash(Flash):
    """Notes the largest size that a file ever had."""

    most: int = 0

    def append(self, name: str, data: bytes) -> None:
        super().append(name, data)
        self.most = max(self.most, self.size(name) or 0)


async def fetch(server: EvilServer, flash: Flash, policy: DownloadPolicy = QUICK, size: int = len(DATA)) -> bytes:
    async with httpx.AsyncClient(timeout=5) as http:
        return await Downloader(flash, http, policy).fetch(server.url(), DIGEST, size)


async def test_a_download_cut_every_64_kb_resumes_where_it_stopped(server: EvilServer) -> None:
    server.answers = [cut_after(64_000)]
    assert await fetch(server, CountingFlash()) == DATA
    assert len(server.requests) == 7
    assert [request.start for request in server.requests[1:]] == sorted({r.start for r in server.requests[1:]})


async def test_a_restarted_device_goes_on_with_what_it_had(server: EvilServer) -> None:
    flash = CountingFlash()
    server.answers = [cut_after(300_000), respond(b"", "503 Service Unavailable")]
    with pytest.raises(DownloadError):
        await fetch(server, flash)
    server.answers, server.requests = [cut_after(1 << 30)], []
    assert await fetch(server, flash) == DATA
    assert server.requests[0].start == 300_000


async def test_a_changed_artifact_is_downloaded_from_the_start(server: EvilServer) -> None:
    server.answers = [cut_after(100_000, '"v1"'), cut_after(1 << 30, '"v2"')]
    assert await fetch(server, CountingFlash()) == DATA
    assert server.requests[1].headers["if-range"] == '"v1"'


async def test_a_200_to_a_range_request_starts_anew(server: EvilServer) -> None:
    server.answers = [cut_after(100_000), respond(DATA, ETag='"v1"')]
    flash = CountingFlash()
    assert await fetch(server, flash) == DATA
    assert flash.most == len(DATA)


@pytest.mark.parametrize("span", ["bytes 0-399999/400000", "bytes 100000-399999/400001", "bytes 99999-1/2", ""])
async def test_a_range_that_was_not_asked_for_is_refused(server: EvilServer, span: str) -> None:
    wrong = respond(DATA[100_000:], "206 Partial Content", Content_Range=span)
    server.answers = [cut_after(100_000), wrong, cut_after(1 << 30)]
    assert await fetch(server, CountingFlash()) == DATA


async def test_a_416_starts_anew(server: EvilServer) -> None:
    server.answers = [cut_after(100_000), respond(b"", "416 Range Not Satisfiable"), cut_after(1 << 30)]
    assert await fetch(server, CountingFlash()) == DATA


async def test_never_more_than_the_signed_size_is_written(server: EvilServer) -> None:
    async def endless(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not writer.is_closing():
            writer.write(DATA)
            await writer.drain()

    server.answers, flash = [endless], CountingFlash()
    with pytest.raises(ContentError, match="more than the signed"):
        await fetch(server, flash)
    assert flash.most <= len(DATA)


@pytest.mark.parametrize("lie", [len(DATA) - 1, len(DATA) + 1, 10**15])
async def test_another_content_length_than_the_signed_size_is_refused(server: EvilServer, lie: int) -> None:
    server.answers, flash = [respond(DATA, length=lie)], CountingFlash()
    with pytest.raises(ContentError, match="are signed"):
        await fetch(server, flash)
    assert flash.most == 0


async def test_other_bytes_of_the_right_size_are_refused_and_forgotten(server: EvilServer) -> None:
    server.answers, flash = [respond(DATA[::-1])], CountingFlash()
    with pytest.raises(ContentError, match="sha256"):
        await fetch(server, flash)
    assert flash.size(f"download/{DIGEST}.part") is None


async def test_a_gzip_bomb_is_not_inflated(server: EvilServer) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    server.answers, flash = [respond(bomb, Content_Encoding="gzip")], CountingFlash()
    with pytest.raises(DownloadError, match="encoded"):
        await fetch(server, flash)
    assert flash.most == 0


async def test_a_redirect_to_another_host_is_refused_and_one_on_the_same_host_followed(server: EvilServer) -> None:
    away = respond(b"", "302 Found", Location=server.url("localhost"))
    server.answers = [away]
    with pytest.raises(DownloadError, match="refused a redirect"):
        await fetch(server, CountingFlash())
    assert all(request.headers["host"].startswith("127.0.0.1") for request in server.requests)
    server.answers, server.requests = [respond(b"", "302 Found", Location="/elsewhere"), respond(DATA)], []
    assert await fetch(server, CountingFlash()) == DATA
    assert server.requests[1].path == "/elsewhere"


async def test_a_redirect_loop_ends(server: EvilServer) -> None:
    server.answers = [respond(b"", "302 Found", Location="/again")]
    with pytest.raises(DownloadError, match="redirects"):
        await fetch(server, CountingFlash())


async def trickle(request: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(f'HTTP/1.1 200 OK\r\nETag: "v1"\r\nContent-Length: {len(DATA)}\r\n\r\n'.encode())
    while not writer.is_closing():
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.1)


async def test_slow_retrieval_is_given_up_within_two_windows(server: EvilServer) -> None:
    server.answers = [trickle]
    started = asyncio.get_running_loop().time()
    with pytest.raises(DownloadError, match="too slow"):
        await fetch(server, CountingFlash(), DownloadPolicy(window_seconds=0.5))
    assert asyncio.get_running_loop().time() - started < 1


async def test_without_the_least_rate_slow_retrieval_holds_a_device_until_its_deadline(server: EvilServer) -> None:
    server.answers = [trickle]
    policy = DownloadPolicy(min_bytes_per_second=0, window_seconds=0.5, fruitless_attempts=1, overall_seconds=2)
    with pytest.raises(DownloadError, match="not finished within"):
        await fetch(server, CountingFlash(), policy)
    assert len(server.requests) == 1


async def test_a_stalled_server_is_given_up(server: EvilServer) -> None:
    async def stall(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(3)

    server.answers = [stall]
    with pytest.raises(DownloadError, match="too slow"):
        await fetch(server, CountingFlash(), DownloadPolicy(window_seconds=0.3, fruitless_attempts=1))


async def test_a_full_disk_is_reported_as_flash(server: EvilServer) -> None:
    class Full(Flash):
        def append(self, name: str, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    server.answers = [respond(DATA)]
    with pytest.raises(FlashError, match="No space left"):
        await fetch(server, Full())
