"""`python -m enrolment`: the enrolment server. Add more of them behind a TCP load balancer; they share nothing but PostgreSQL.

TLS ends here, never in front of it: the client's certificate is what it is about.
"""

import argparse
import asyncio
import signal
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import structlog
import uvicorn
import uvloop

from enrolment.service import EnrolmentService
from enrolment.tls import PeerCertificateProtocol, server_context
from enrolment.trust import Trust
from enrolment.waiting import Changes
from models.errors import InvalidInputError, NotFoundError, TidegateError, UnavailableError
from models.settings import Settings
from observe import logs, metrics
from observe.stopping import patiently
from store.engine import Database
from store.enrolments import EnrolmentStore
from store.peers import PeerStore
from workflows.client import connect, start_own_rotation

log = structlog.get_logger("enrolment")

_AWAY = (UnavailableError, NotFoundError)
"""What is waited for: a server, or the schema."""

DATABASE_CONNECTIONS = 10
"""A request that waits holds none."""

MAX_CONNECTIONS = 2000
"""Open at one time; more are answered with 503 and come again."""

GRACE_SECONDS = 12
"""A request that is held when the server is told to stop gets its answer."""


class Server(uvicorn.Server):
    """Leaves signals to the process."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """See the class."""
        yield


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise InvalidInputError(
            f"cannot listen on {host}:{port}: {error.strerror}; check TIDEGATE_ENROLMENT_HOST and TIDEGATE_ENROLMENT_PORT"
        ) from error


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    certificate, key = settings.enrolment_certificate, settings.enrolment_private_key
    if not settings.database_url or not settings.temporal_address or certificate is None or key is None:
        raise InvalidInputError(
            "the enrolment server needs TIDEGATE_DATABASE_URL, TIDEGATE_TEMPORAL_ADDRESS, "
            "TIDEGATE_ENROLMENT_CERTIFICATE and TIDEGATE_ENROLMENT_PRIVATE_KEY"
        )
    address, namespace = settings.temporal_address, settings.temporal_namespace
    context = server_context(certificate, key)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    port = metrics.serve(settings.metrics_host, settings.enrolment_metrics_port)
    db = Database(settings.database_url, max_size=DATABASE_CONNECTIONS)
    opened = await patiently(log, "PostgreSQL", lambda: _open(db), stop, *_AWAY)
    client = await patiently(log, "Temporal", lambda: connect(address, namespace), stop, *_AWAY)
    if opened and client:
        trust, changes = Trust(db, context), Changes(settings.database_url)
        await trust.refresh()
        service = EnrolmentService(
            EnrolmentStore(db),
            PeerStore(db),
            client,
            changes,
            trust,
            settings.enrolment_wait_seconds,
            renewed=partial(start_own_rotation, client, overlap=timedelta(hours=settings.rotation_overlap_hours)),
        )
        listening = _listening(settings.enrolment_host, settings.enrolment_port)
        server = Server(
            uvicorn.Config(
                service.application(),
                http=PeerCertificateProtocol,
                ws="none",
                lifespan="off",
                ssl_context_factory=lambda _config, _default: context,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
        background = [asyncio.create_task(changes.listen()), asyncio.create_task(trust.keep())]
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        metrics.mark_ready("enrolment")
        log.info("ready", metrics_port=port, address="https://{}:{}".format(*listening.getsockname()[:2]))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
        metrics.mark_ready("enrolment", False)
        server.should_exit = True
        await serving
        for task in (*background, stopped):
            task.cancel()
        await asyncio.gather(*background, stopped, return_exceptions=True)
    await db.close()
    log.info("stopped")


async def _open(db: Database) -> Database:
    await db.open()
    return db


def main() -> None:
    """Entry point."""
    argparse.ArgumentParser(
        prog="python -m enrolment",
        description="Devices' first and later certificates, by EST (RFC 7030) over HTTPS. Settings come from "
        "TIDEGATE_... variables and from the state directory of a running stack (docs/reference.md).",
    ).parse_args()
    settings = Settings().with_endpoints()
    logs.configure("enrolment", settings)
    try:
        uvloop.run(serve(settings))
    except TidegateError as error:
        log.error("enrolment server stopped", error=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
