"""The artifact server: images and deltas over HTTP from a folder, with range requests.

Serves `<root>/artifacts/<sha256>` and nothing else. A name is 64 hex digits or it is not found, so no request reaches
another file; what a name stands for never changes, so caches may keep it for ever and the name is its own ETag.

`python -m devstack.artifacts --root FOLDER --port PORT` runs it alone, on loopback.
"""

import argparse
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, Counter, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from devstack.interface import Launch, Piece
from devstack.state import StateDirectory
from models.errors import InvalidInputError
from models.ids import SHA256
from models.settings import Settings
from observe import logs, metrics

CACHE_CONTROL = "public, max-age=31536000, immutable"
REQUESTS = Counter("tidegate_artifact_requests", "Requests to the artifact server, by status.", ["status"])


def application(root: Path) -> Starlette:
    """The server of one folder."""

    async def artifact(request: Request) -> Response:
        name = request.path_params["name"]
        path = root / "artifacts" / name
        if not SHA256.fullmatch(name) or not path.is_file() or path.is_symlink():
            REQUESTS.labels("404").inc()
            return PlainTextResponse("no such artifact: expected /artifacts/<sha256>\n", status_code=404)
        headers = {"etag": f'"{name}"', "cache-control": CACHE_CONTROL, "x-content-type-options": "nosniff"}
        REQUESTS.labels("206" if "range" in request.headers else "200").inc()
        return FileResponse(path, media_type="application/octet-stream", headers=headers)

    async def health(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def prometheus(_request: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return Starlette(
        routes=[
            Route("/artifacts/{name}", artifact, methods=["GET"]),
            Route("/health", health),
            Route("/metrics", prometheus),
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m devstack.artifacts", description="Serve a folder of artifacts.")
    parser.add_argument("--root", type=Path, required=True, help="folder that holds artifacts/<sha256>")
    parser.add_argument("--port", type=int, required=True, help="port on the loopback interface")
    options = parser.parse_args(arguments)
    log = logs.configure("artifacts", Settings())
    metrics.mark_ready("artifacts")
    log.info("ready", root=str(options.root), port=options.port)
    config = uvicorn.Config(
        application(options.root.absolute()),
        host="127.0.0.1",
        port=options.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run()


class ArtifactServer(Piece):
    """The artifact server as a piece of the stack."""

    name = "artifacts"
    title = "Artifact server"

    def __init__(self, state: StateDirectory, store_url: str) -> None:
        """`store_url`: where the worker keeps artifacts; only a folder (`file:///...`) can be served."""
        parts = urlsplit(store_url)
        if parts.scheme != "file":
            raise InvalidInputError(
                f"cannot serve the artifact store {store_url}: the embedded server serves a folder only; "
                "set TIDEGATE_ARTIFACT_URL to the address from which devices download"
            )
        self._root = Path(unquote(parts.path))
        self._state = state
        self._port = 0

    def prepare(self) -> None:
        """Make the folder."""
        (self._root / "artifacts").mkdir(parents=True, exist_ok=True)
        self._port = self._state.port(self.name)

    def launch(self) -> Launch:
        """This module as a program."""
        command = (sys.executable, "-m", "devstack.artifacts", "--root", str(self._root), "--port", str(self._port))
        return Launch(command=command, stop_seconds=5)

    async def answers(self) -> bool:
        """Whether its health page does."""
        async with httpx.AsyncClient(trust_env=False) as http:
            try:
                answer = await http.get(f"{self.address}/health")
            except httpx.HTTPError:
                return False
        return answer.status_code == httpx.codes.OK

    @property
    def address(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self._port}"

    def endpoints(self) -> dict[str, Any]:
        """`artifact_url`; its metrics are on the same port."""
        return {"artifact_url": self.address, "metrics": {self.name: f"{self.address}/metrics"}}


if __name__ == "__main__":
    main()
