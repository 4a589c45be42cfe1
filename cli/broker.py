"""`broker list | setup`: which brokers enforce what, and everything that a Mosquitto of one's own needs."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from access.folder import BrokerFolder
from access.mosquitto import CLIENT_NAMES, MosquittoFiles, MosquittoListeners, config
from access.plan import plan_access
from cli.command import Session, command
from cli.output import as_dict, facts, rough, table
from devstack.broker import MAX_PACKET_BYTES
from devstack.identity import BROKER, SERVICE_DAYS, issue_files
from models.errors import InvalidInputError
from models.identity import AuthorityKind
from models.views import BrokerView
from pki.authority import Authority, read_certificate
from pki.signer import key_store
from store.authorities import AuthorityStore
from store.brokers import BrokerStore

app = typer.Typer(help="Brokers: what they enforce, and the files of a new one.", no_args_is_help=True)

SILENT_AFTER = timedelta(minutes=1)
"""An access keeper is heard of four times in it."""


@command(app, "list")
async def list_brokers(session: Session) -> None:
    """Show each broker, the revision of access that it enforces, and what keeps it from the newest."""
    async with session.database() as db:
        store = BrokerStore(db)
        wanted, brokers = await store.wanted(), await store.find()
    rows = (
        (view.broker_id, f"{view.applied_revision} of {wanted}", _state(view, wanted), _left(view), view.error or "")
        for view in brokers
    )
    shown = table("Brokers", ("broker", "enforces", "state", "revocation list", "what is missing"), rows)
    session.out.result({"revision": wanted, "brokers": [as_dict(view) for view in brokers]}, shown)


def _state(view: BrokerView, wanted: int) -> str:
    if datetime.now(UTC) - view.seen_at > SILENT_AFTER:
        return f"not heard of for {rough(datetime.now(UTC) - view.seen_at)}"
    return "in step" if view.applied_revision == wanted and not view.error else "behind"


def _left(view: BrokerView) -> str:
    if view.crl_next_update is None:
        return ""
    left = view.crl_next_update - datetime.now(UTC)
    return f"{rough(left)} left" if left > timedelta(0) else "over: no device can connect"


@command(app, "setup")
async def setup(
    session: Session,
    host: Annotated[
        list[str], typer.Option(metavar="NAME", help="Name or address by which it is reached; repeat for several.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Gets everything; has to be empty or not there.")],
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="Where these files will be on the broker's machine.")
    ] = Path("/etc/mosquitto/tidegate"),
    devices_port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", help="Port for devices.")] = 8883,
    engine_port: Annotated[
        int, typer.Option(min=1, max=65535, metavar="N", help="Port for gateway, worker and access keeper.")
    ] = 8884,
    listen: Annotated[str, typer.Option(metavar="ADDRESS", help="Address it listens on.")] = "0.0.0.0",
    persistence: Annotated[
        Path, typer.Option(metavar="DIR", help="Where it keeps sessions and retained messages.")
    ] = Path("/var/lib/mosquitto"),
    pid_file: Annotated[Path, typer.Option(metavar="FILE", help="Its process id file.")] = Path(
        "/run/mosquitto/mosquitto.pid"
    ),
    days: Annotated[int, typer.Option(min=1, metavar="N", help="Life of the certificates.")] = SERVICE_DAYS,
) -> None:
    """Write the configuration of a Mosquitto, its certificate, those of the services, and what it has to enforce now.

    Needs the CA's keys. The files have to get to the broker's machine; the access keeper keeps DIR/access from then on
    (deploy/mosquitto/README.md).
    """
    if out.exists() and any(out.iterdir()):
        raise InvalidInputError(f"cannot write to {out}: it is not empty; choose another directory")
    keys = key_store(session.settings)
    async with session.database() as db:
        issuer = await AuthorityStore(db).active(AuthorityKind.SERVICE)
        trusted = await AuthorityStore(db).trusted(AuthorityKind.SERVICE)
        snapshot = await BrokerStore(db).snapshot()
    plan = plan_access(snapshot, {}, session.settings.access_broker_id, datetime.now(UTC))
    key = await asyncio.to_thread(keys.open, issuer.key_reference)
    authority, now = Authority(read_certificate(issuer.certificate), key), datetime.now(UTC)
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    (out / "access").mkdir(mode=0o755)
    BrokerFolder(out / "access").write(plan.files)
    (out / "ca.pem").write_text("".join(view.certificate.strip() + "\n" for view in trusted))
    for name in (BROKER, *CLIENT_NAMES):
        issue_files(authority, out, name, host if name == BROKER else (), now, days)
    files = MosquittoFiles(
        folder=folder / "access",
        certificate=folder / f"{BROKER}.pem",
        private_key=folder / f"{BROKER}.key",
        service_ca=folder / "ca.pem",
        pid_file=pid_file,
        persistence=persistence,
    )
    listeners = MosquittoListeners(devices_port, engine_port, host=listen)
    (out / "mosquitto.conf").write_text(config(listeners, files, MAX_PACKET_BYTES))
    session.out.result({"out": str(out), "devices_denied": len(plan.denied)}, facts(_said(out, folder)))


def _said(out: Path, folder: Path) -> Iterator[tuple[str, object]]:
    yield "configuration", f"{out / 'mosquitto.conf'}, to be the broker's own"
    yield "files", f"{out}, to be {folder} on the broker's machine"
    yield "services", ", ".join(f"{name}.pem and .key" for name in CLIENT_NAMES)
    yield "next", "python -m access beside the broker (deploy/mosquitto/README.md)"
