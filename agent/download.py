"""Downloads: an artifact of a known digest and size, in as many pieces as it takes, and never a byte more.

Rules: the signed size is the hard cap on what is written; a transfer resumes by Range with If-Range, only while the
server's strong validator is the same; redirects are followed on the same host alone; encoded answers are refused (a
gzip bomb is not inflated, it is not even read); an average under `min_bytes_per_second` over `window_seconds` ends the
attempt. Failures are DownloadError (network), ContentError (verify) or FlashError (flash).

What it is not: the judge of what may be installed; digest and size come from a verified update.
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import httpx

from agent.errors import ContentError, DownloadError, FlashError, TooSlowError
from agent.storage import Storage

MAX_REDIRECTS = 3
SYNC_EVERY_BYTES = 256 * 1024
"""A power cut costs at most this much of a download."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class DownloadPolicy:
    """How patient a download is. `bytes_per_second` holds it back on purpose (slow links in the fleet simulator)."""

    min_bytes_per_second: float = 100.0
    window_seconds: float = 60.0
    overall_seconds: float = 7200.0
    fruitless_attempts: int = 5
    pause_seconds: float = 1.0
    bytes_per_second: float | None = None


@dataclass(slots=True)
class _Part:
    """A partial file: how much of it is there, and the validator it belongs to."""

    name: str
    size: int
    etag: str | None


Progress = Callable[[int, int], None]


class Downloader:
    """Fetches artifacts into the download folder of a device's storage."""

    def __init__(self, storage: Storage, http: httpx.AsyncClient, policy: DownloadPolicy | None = None) -> None:
        self._storage = storage
        self._http = http
        self._policy = policy or DownloadPolicy()

    async def fetch(self, url: str, sha256: str, size_bytes: int, progress: Progress | None = None) -> bytes:
        """The artifact's bytes, of exactly this digest and size. What a former run has fetched is used.

        Raises:
            DownloadError: not to be had within the policy; what came is kept for the next try.
            ContentError: it is not what was signed; what came is gone.
            FlashError: it could not be written down.
        """
        try:
            async with asyncio.timeout(self._policy.overall_seconds):
                return await self._fetch(url, sha256, size_bytes, progress or _ignore)
        except TimeoutError as error:
            raise DownloadError(
                f"cannot download {sha256[:16]}: not finished within {self._policy.overall_seconds:.0f} s"
            ) from error
        except OSError as error:
            raise FlashError(f"cannot keep the download {sha256[:16]}: {error.strerror or error}") from error

    def forget(self, sha256: str) -> None:
        """Drop what was fetched of an artifact. Raises OSError."""
        for suffix in (".part", ".etag"):
            self._storage.unlink(f"download/{sha256}{suffix}")

    async def _fetch(self, url: str, sha256: str, size_bytes: int, progress: Progress, once_more: bool = True) -> bytes:
        part = self._resume(sha256, size_bytes)
        fruitless, resumed = 0, part.size > 0
        while part.size < size_bytes:
            before = part.size
            try:
                await self._attempt(url, part, size_bytes, progress)
            except TooSlowError:
                raise
            except (httpx.HTTPError, DownloadError) as error:
                fruitless = 0 if part.size > before else fruitless + 1
                if fruitless >= self._policy.fruitless_attempts:
                    raise DownloadError(f"cannot download {url}: {type(error).__name__}: {error}") from error
                resumed = resumed or part.size > 0
                await asyncio.sleep(self._policy.pause_seconds * max(1, fruitless))
        data = self._storage.read(part.name) or b""
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        self.forget(sha256)
        if (
            resumed and once_more
        ):  # the parts may not belong together (power cut, a server that lies about its validator)
            return await self._fetch(url, sha256, size_bytes, progress, once_more=False)
        raise ContentError(f"cannot use {url}: {len(data)} bytes came, their sha256 is not {sha256[:16]}")

    def _resume(self, sha256: str, size_bytes: int) -> _Part:
        name = f"download/{sha256}.part"
        etag = (self._storage.read(f"download/{sha256}.etag") or b"").decode("ascii", "replace")
        size = self._storage.size(name) or 0
        if size == size_bytes or (etag and size < size_bytes):
            return _Part(name, size, etag or None)
        self.forget(sha256)
        return _Part(name, 0, None)

    async def _attempt(self, url: str, part: _Part, size_bytes: int, progress: Progress) -> None:
        """One request: adds to the part what comes, in order, up to the signed size."""
        headers = {"Accept-Encoding": "identity"}
        if part.size and part.etag:
            headers |= {"Range": f"bytes={part.size}-", "If-Range": part.etag}
        elif part.size:
            self._restart(part)
        response = await self._open(url, headers)
        try:
            self._place(response, part, size_bytes)
            pace = _Pace(self._policy)
            unsynced = 0
            async for chunk in pace.watch(response.aiter_raw()):
                if part.size + len(chunk) > size_bytes:
                    self._restart(part)
                    raise ContentError(f"cannot use {url}: more than the signed {size_bytes} bytes came")
                self._storage.append(part.name, chunk)
                part.size += len(chunk)
                unsynced += len(chunk)
                if unsynced >= SYNC_EVERY_BYTES:
                    self._storage.sync(part.name)
                    unsynced = 0
                progress(part.size, size_bytes)
        finally:
            await response.aclose()
        if part.size < size_bytes:
            raise DownloadError(f"the answer ended after {part.size} of {size_bytes} bytes")

    async def _open(self, url: str, headers: Mapping[str, str]) -> httpx.Response:
        """Send the request; follow redirects on the same host alone."""
        address = url
        for _ in range(MAX_REDIRECTS + 1):
            request = self._http.build_request("GET", address, headers=headers)
            response = await self._http.send(request, stream=True, follow_redirects=False)
            if not response.has_redirect_location:
                return response
            await response.aclose()
            address = urljoin(address, response.headers["location"])
            if _origin(address) != _origin(url):
                raise DownloadError(f"refused a redirect from {_origin(url)} to {_origin(address)}")
        raise DownloadError(f"more than {MAX_REDIRECTS} redirects")

    def _place(self, response: httpx.Response, part: _Part, size_bytes: int) -> None:
        """Make the part ready for what this answer brings, or refuse the answer."""
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise DownloadError(f"refused an answer encoded as {encoding!r:.40}: identity was asked for")
        if response.status_code == httpx.codes.PARTIAL_CONTENT:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
            if match and int(match[1]) == part.size and match[2] in (str(size_bytes), "*") and part.size:
                return
            self._restart(part)
            raise DownloadError(
                f"refused the range {response.headers.get('content-range')!r:.60}: not the one asked for"
            )
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            self._restart(part)
        if response.status_code != httpx.codes.OK:
            raise DownloadError(f"the server answered {response.status_code}")
        self._restart(part)
        length = response.headers.get("content-length")
        if length is not None and length != str(size_bytes):
            raise ContentError(
                f"cannot use {response.url}: the server offers {length:.20} bytes, {size_bytes} are signed"
            )
        etag = response.headers.get("etag", "")
        part.etag = etag if etag.startswith('"') and etag.isascii() and len(etag) <= 200 else None
        if part.etag:
            self._storage.write(part.name.removesuffix(".part") + ".etag", part.etag.encode())

    def _restart(self, part: _Part) -> None:
        self._storage.unlink(part.name.removesuffix(".part") + ".etag")
        self._storage.unlink(part.name)
        part.size, part.etag = 0, None


class _Pace:
    """Ends a transfer that is slower than the policy's average over a window, and slows down one that is too fast."""

    def __init__(self, policy: DownloadPolicy) -> None:
        self._policy = policy

    async def watch(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The chunks as they come. Raises TooSlowError."""
        policy, loop, arrived = self._policy, asyncio.get_running_loop(), 0
        ends = loop.time() + policy.window_seconds
        while True:
            waiting = asyncio.ensure_future(anext(chunks, None))
            try:
                while not (await asyncio.wait({waiting}, timeout=max(0.0, ends - loop.time())))[0]:
                    ends, arrived = self._next_window(arrived), 0
                chunk = waiting.result()
            finally:
                waiting.cancel()
            if chunk is None:
                return
            arrived += len(chunk)
            yield chunk
            if policy.bytes_per_second:
                await asyncio.sleep(len(chunk) / policy.bytes_per_second)
            if loop.time() >= ends:
                ends, arrived = self._next_window(arrived), 0

    def _next_window(self, arrived: int) -> float:
        policy = self._policy
        if arrived < policy.min_bytes_per_second * policy.window_seconds:
            raise TooSlowError(
                f"too slow: {arrived} bytes in {policy.window_seconds:g} s, "
                f"at least {policy.min_bytes_per_second:g} bytes/s expected"
            )
        return asyncio.get_running_loop().time() + policy.window_seconds


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _ignore(done: int, whole: int) -> None:
    """No one wants to know."""
