"""`claim create | list | show | disable | allow`: batches of devices that may enrol with one claim certificate."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from pydantic import ValidationError

from cli.command import Session, command, whoami
from cli.output import facts, table, when
from domain.mistakes import faults_of, path_of
from models.errors import InvalidInputError, Mistake, NotFoundError, SpecError
from models.identity import AuthorityKind, ClaimBatchSpec, ClaimBatchView
from models.ids import SERIAL_NUMBER
from models.quantities import parse_duration
from models.settings import Settings
from pki.authority import Authority, certificate_id, pem_of, read_certificate
from pki.issue import issue_claim
from pki.signer import key_store
from store.authorities import AuthorityStore
from store.claims import ClaimStore
from store.configurations import check_config
from store.engine import Database

app = typer.Typer(help="Claim batches: who may enrol, how many, until when.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="BATCH", help="Name of the batch.")]
SerialsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Allow-list: one serial number on each line.", show_default=False)
]


@command(app, "create")
async def create(
    session: Session,
    name: Name,
    type_: Annotated[str, typer.Option("--type", metavar="TYPE", help="Device type of those that enrol.")],
    site: Annotated[str, typer.Option(metavar="SITE", help="Site of those that enrol.")],
    max_: Annotated[int, typer.Option("--max-devices", min=1, metavar="N", help="Most devices that may enrol.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Writes claim.key, claim.pem and ca.pem there.")],
    expires: Annotated[
        str, typer.Option(metavar="WHEN", help="Nobody enrols after: 90d from now, or 2027-01-31.")
    ] = "90d",
    serials: SerialsOption = None,
    listed_only: Annotated[
        bool, typer.Option("--listed-only", help="Only serial numbers on the list may enrol; implied by --serials.")
    ] = False,
    approval: Annotated[
        str, typer.Option(metavar="none|manual", help="manual: a person approves each device.")
    ] = "none",
    zone: Annotated[str | None, typer.Option(metavar="ZONE")] = None,
    manufacturer: Annotated[str | None, typer.Option(metavar="NAME")] = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="TAG=VALUE", help="Repeat for several.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Initial configuration: a JSON object.", show_default=False)
    ] = None,
    id_prefix: Annotated[str, typer.Option(metavar="TEXT", help="Device ids are this and the serial number.")] = "",
    alarm_per_minute: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="More new requests within a minute raise an alert; 1000 where nothing is given."
        ),
    ] = None,
) -> None:
    """Make a batch and its claim certificate.

    The files in DIR go into the devices of the batch. A key that is in many devices is not very secret: the batch bounds
    what it is worth, and 'claim disable' ends it.
    """
    listed = [] if serials is None else read_serials(serials)
    spec = _spec(
        name=name,
        device_type=type_,
        site_id=site,
        zone=zone,
        manufacturer=manufacturer,
        tags=dict(_tag(each) for each in tag or []),
        config={} if config is None else _config(config),
        id_prefix=id_prefix,
        approval=approval,
        listed_only=listed_only or bool(listed),
        max_devices=max_,
        alarm_per_minute=alarm_per_minute,
        expires_at=_expiry(expires, datetime.now(UTC)),
    )
    async with session.database() as db:
        made = await make_claim(db, session.settings, spec, listed, whoami(), out)
    session.out.result(made, facts(_facts_of(made)))
    session.out.say(
        f"wrote {out / 'claim.key'} (secret), {out / 'claim.pem'} and {out / 'ca.pem'}; a device enrols with them: "
        f"'starter.py device enroll SERIAL --claim {out} --out DIR' does so by hand"
    )


@command(app, "list")
async def list_batches(session: Session) -> None:
    """List batches, the newest first."""
    async with session.database() as db:
        found = await ClaimStore(db).all()
    rows = [
        (b.name, b.device_type, b.site_id, f"{b.enrolled} of {b.max_devices}", b.listed, b.approval, when(b.expires_at), _state(b))
        for b in found
    ]  # fmt: skip
    columns = ("batch", "type", "site", "enrolled", "listed", "approval", "expires", "state")
    session.out.result(
        {"batches": [b.model_dump(mode="json") for b in found]}, [table("", columns, rows)] if rows else []
    )
    if not found:
        session.out.say("no batch; 'claim create' makes one")


@command(app, "show")
async def show(session: Session, name: Name) -> None:
    """Show a batch."""
    async with session.database() as db:
        found = await ClaimStore(db).get(name)
    session.out.result(found, facts(_facts_of(found)))


@command(app, "disable")
async def disable(
    session: Session, name: Name, reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; for the audit.")] = ""
) -> None:
    """Let nobody in with this claim certificate any more, from now on.

    Devices that have enrolled keep what they have. There is no way back: make another batch.
    """
    async with session.database() as db:
        found = await ClaimStore(db).disable(name, whoami(), reason)
    session.out.result(found, facts(_facts_of(found)))


@command(app, "allow")
async def allow(
    session: Session,
    name: Name,
    serial: Annotated[list[str] | None, typer.Argument(metavar="SERIAL...", help="Serial numbers.")] = None,
    serials: SerialsOption = None,
) -> None:
    """Add serial numbers to a batch's allow-list."""
    wanted = [_serial(each, "SERIAL") for each in serial or []] + ([] if serials is None else read_serials(serials))
    if not wanted:
        raise InvalidInputError("cannot add to the list: expected serial numbers, or --serials FILE")
    async with session.database() as db:
        added = await ClaimStore(db).allow(name, wanted, whoami())
    session.out.result({"batch": name, "added": added, "given": len(wanted)}, f"{added} of {len(wanted)} are new")


async def make_claim(
    db: Database, settings: Settings, spec: ClaimBatchSpec, serials: list[str], actor: str, out: Path
) -> ClaimBatchView:
    """Make a batch, and write `claim.key`, `claim.pem` and `ca.pem` for its devices into `out`."""
    authorities = AuthorityStore(db)
    view = await authorities.active(AuthorityKind.CLAIM)
    trusted = await authorities.trusted(AuthorityKind.SERVICE)
    authority = Authority(read_certificate(view.certificate), key_store(settings).open(view.key_reference))
    key = generate_private_key(SECP256R1())
    claim = issue_claim(authority, key.public_key(), spec.name, datetime.now(UTC), spec.expires_at)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_new(out / "claim.key", secret, secret=True)
    try:
        write_new(out / "claim.pem", pem_of(claim).encode())
        made = await ClaimStore(db).create(spec, serials, pem_of(claim), certificate_id(claim), actor)
    except BaseException:
        for name in ("claim.key", "claim.pem"):
            (out / name).unlink(missing_ok=True)
        raise
    (out / "ca.pem").write_text("".join(each.certificate for each in trusted))
    return made


def write_new(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Write a file that does not exist yet; a secret one for its owner alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except FileExistsError as error:
        raise InvalidInputError(f"cannot write {path}: it exists; choose another directory") from error
    except OSError as error:
        raise InvalidInputError(f"cannot write {path}: {error.strerror}") from error


def read_serials(path: Path) -> list[str]:
    """The serial numbers of a file, one on each line; empty lines do not count."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot read {path}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read {path}: {error}") from error
    return [_serial(line.strip(), f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _serial(text: str, where: str) -> str:
    if not SERIAL_NUMBER.fullmatch(text):
        raise InvalidInputError(
            f"{where}: {text[:80]!r} is not a serial number; expected 1 to 64 letters, digits and : . _ -"
        )
    return text


def _tag(text: str) -> tuple[str, str]:
    key, equals, tag = text.partition("=")
    if not key or not equals:
        raise InvalidInputError(f"not a tag: {text!r}, expected TAG=VALUE")
    return key, tag


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot read {path}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise InvalidInputError(f"cannot use {path}: expected a JSON object")
    check_config(found)
    return found


def _expiry(text: str, now: datetime) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    except ValueError:
        try:
            moment = now + parse_duration(text)
        except (ValueError, OverflowError) as error:
            raise InvalidInputError(f"--expires: expected 90d or 2027-01-31, got {text!r}") from error
    if moment <= now:
        raise InvalidInputError(f"--expires {text}: {when(moment)} is over, expected a time to come")
    return moment


def _spec(**given: Any) -> ClaimBatchSpec:
    try:
        return ClaimBatchSpec.model_validate(given)
    except ValidationError as error:
        raise SpecError("batch", [Mistake(path_of(f.where), f.message) for f in faults_of(error)]) from error


def _state(batch: ClaimBatchView) -> str:
    if batch.disabled_at is not None:
        return "disabled"
    if batch.expires_at <= datetime.now(UTC):
        return "expired"
    return "full" if batch.enrolled >= batch.max_devices else "open"


def _facts_of(batch: ClaimBatchView) -> list[tuple[str, object]]:
    return [("state", _state(batch)), *((name, getattr(batch, name)) for name in ClaimBatchView.model_fields)]
