"""`ca init | show | roll | retire | crl`: the certificate authorities.

`init`, `roll` and `crl --sign` need the keys (TIDEGATE_CA_DIR); the others need PostgreSQL alone.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from activities.authorities import AuthorityActivities, activate_authority, announce_authority, ensure_authorities
from cli.command import Session, command, whoami
from cli.output import facts, rough, table, when
from models.errors import InvalidInputError
from models.identity import AuthorityKind, AuthorityState, AuthorityView, PublishCrlsInput
from models.quantities import parse_duration
from pki.authority import AUTHORITY_DAYS, read_certificate
from pki.revocation import verify_crl
from pki.signer import key_store
from store.authorities import AuthorityStore, PublishedCrl

app = typer.Typer(help="Certificate authorities: init, show, roll, retire, crl.", no_args_is_help=True)

KindArgument = Annotated[AuthorityKind, typer.Argument(metavar="KIND", help=f"One of {', '.join(AuthorityKind)}.")]
ReasonOption = Annotated[str, typer.Option(metavar="TEXT", help="Why, for the audit.")]
DaysOption = Annotated[int, typer.Option(min=1, max=36500, metavar="N", help="Life of the CA's certificate.")]


@command(app, "init")
async def init(session: Session, days: DaysOption = AUTHORITY_DAYS) -> None:
    """Make the certificate authorities that are missing: for devices, for claims, for services.

    Keys go to TIDEGATE_CA_DIR, encrypted with the passphrase in TIDEGATE_CA_PASSPHRASE_FILE; where these are not set, to
    ca/ and ca.passphrase of the state directory. The passphrase is made where its file is missing. Keep both, and apart.
    """
    keys = key_store(session.settings, make=True)
    async with session.database() as db:
        before = {view.authority_id for view in await AuthorityStore(db).find()}
        lifetime = timedelta(hours=session.settings.crl_hours)
        found = await ensure_authorities(db, keys, datetime.now(UTC), whoami(), days=days, crl_lifetime=lifetime)
    made = [kind for kind, view in found.items() if view.authority_id not in before]
    shown = {"authorities": [_shown(view) for view in found.values()], "made": made}
    session.out.result(shown, [_table(list(found.values()), datetime.now(UTC))])
    session.out.say(f"made {', '.join(made)}" if made else "all of them exist already; nothing changed")


@command(app, "show")
async def show(
    session: Session,
    authority: Annotated[
        str | None,
        typer.Argument(metavar="AUTHORITY", help="Id (its beginning will do), name or kind; all where not given."),
    ] = None,
    kind: Annotated[
        AuthorityKind | None, typer.Option(metavar="KIND", help=f"One of {', '.join(AuthorityKind)}.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the certificates that are believed to this file, as PEM.")
    ] = None,
) -> None:
    """Show the certificate authorities, or everything on one of them."""
    if named := next((each for each in AuthorityKind if each == authority), None):
        authority, kind = None, named
    async with session.database() as db:
        store = AuthorityStore(db)
        found = [await store.get(authority)] if authority is not None else await store.find(kind)
    if out is not None:
        believed = [view.certificate for view in found if view.state is not AuthorityState.RETIRED]
        _write(out, "".join(believed).encode())
    if authority is not None:
        session.out.result(_shown(found[0]), facts(_facts_of(found[0])))
    else:
        tables = [_table(found, datetime.now(UTC))] if found else []
        session.out.result({"authorities": [_shown(view) for view in found]}, tables)
    if not found:
        session.out.say("no certificate authority; 'ca init' makes them")


@command(app, "roll")
async def roll(
    session: Session,
    kind: KindArgument,
    announce: Annotated[
        bool, typer.Option("--announce", help="Only make it known: it is believed, and does not issue yet.")
    ] = False,
    within: Annotated[
        str,
        typer.Option(metavar="DURATION", help="How long brokers may take to know it before it issues; 0s: at once."),
    ] = "60s",
    days: DaysOption = AUTHORITY_DAYS,
    reason: ReasonOption = "",
) -> None:
    """Make a CA's successor: first everybody believes it, then it issues. The old one is believed until it is retired.

    A service CA wants time between the two: devices learn of it when they renew their certificates, so announce it, wait
    for that, and roll again.
    """
    keys, lifetime = key_store(session.settings), timedelta(hours=session.settings.crl_hours)
    patience = _duration(within)
    async with session.database() as db:
        view, revision = await announce_authority(db, keys, kind, whoami(), reason, days=days, crl_lifetime=lifetime)
        if not announce:
            view = await activate_authority(db, view, revision, whoami(), reason, within=patience)
    session.out.result(_shown(view), facts(_facts_of(view)))
    if announce:
        session.out.say(f"{view.name} is believed, and does not issue yet; 'ca roll {kind}' lets it")
    else:
        session.out.say(f"{view.name} issues; {_next_of(kind)}")


@command(app, "retire")
async def retire(
    session: Session,
    authority: Annotated[str, typer.Argument(metavar="AUTHORITY", help="Id (its beginning will do) or name.")],
    cut_off: Annotated[
        bool,
        typer.Option(
            "--cut-off", help="Also where certificates of it are in use: they end with it, devices are barred."
        ),
    ] = False,
    reason: ReasonOption = "",
) -> None:
    """Believe a certificate authority no longer. One that issues has to be rolled over first."""
    async with session.database() as db:
        view, ended = await AuthorityStore(db).retire(authority, whoami(), reason, cut_off=cut_off)
    session.out.result({**_shown(view), "certificates_revoked": ended}, facts(_facts_of(view)))
    session.out.say(f"{view.name} is retired" + (f", and {ended} device certificates with it" if ended else ""))


@command(app, "crl")
async def crl(
    session: Session,
    sign: Annotated[bool, typer.Option("--sign", help="Sign new lists now, due or not. Needs the keys.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the newest lists to this file, one after the other, as PEM."),
    ] = None,
) -> None:
    """Show the revocation lists that brokers use: one for each device CA that is believed."""
    async with session.database() as db:
        if sign:
            lifetime = timedelta(hours=session.settings.crl_hours)
            signer = AuthorityActivities(db, key_store(session.settings), lifetime)
            done = await signer.publish(PublishCrlsInput(force=True, actor=whoami()))
            if done.failed:
                raise InvalidInputError(f"cannot sign: {'; '.join(done.failed)}")
        store = AuthorityStore(db)
        lists, views = await store.newest_crls(), {view.authority_id: view for view in await store.find()}
    now = datetime.now(UTC)
    if out is not None:
        for each in lists:  # nothing that does not hold leaves here
            verify_crl(each.pem, read_certificate(views[each.authority_id].certificate), now)
        _write(out, "".join(each.pem for each in lists).encode())
    columns = ("authority", "number", "revoked", "signed", "ends", "left")
    rows = [_crl_row(each, views[each.authority_id], now) for each in lists]
    shown = [_shown_crl(each, views[each.authority_id]) for each in lists]
    session.out.result({"crls": shown}, [table("", columns, rows, right=("number", "revoked"))] if rows else [])
    if not lists:
        session.out.say("no revocation list; 'ca init' makes the device CA and its first one")


def _next_of(kind: AuthorityKind) -> str:
    match kind:
        case AuthorityKind.DEVICE:
            return "devices get certificates of it as they renew; retire the old one when none of its own is valid"
        case AuthorityKind.CLAIM:
            return "batches made from now on have certificates of it; retire the old one when its batches are over"
        case AuthorityKind.SERVICE:
            return "give broker, enrolment server, gateway and workers certificates of it, then retire the old one"


def _table(views: list[AuthorityView], now: datetime) -> Table:
    rows = [
        (
            view.kind,
            view.name,
            view.state,
            when(view.not_after),
            rough(view.not_after - now),
            view.crl_number or None,
            view.authority_id[:16],
        )
        for view in views
    ]
    return table("", ("kind", "name", "state", "ends", "left", "list", "id"), rows, right=("list",))


def _facts_of(view: AuthorityView) -> Iterator[tuple[str, object]]:
    yield "kind", view.kind
    yield "name", view.name
    yield "state", view.state
    yield "id", view.authority_id
    yield "begins", view.not_before
    yield "ends", view.not_after
    yield "key", view.key_reference
    yield "revocation list", view.crl_number or None
    yield "revoked", view.crl_revoked
    yield "list ends", view.crl_next_update


def _shown(view: AuthorityView) -> dict[str, object]:
    return view.model_dump(mode="json")


def _crl_row(crl: PublishedCrl, view: AuthorityView, now: datetime) -> tuple[object, ...]:
    left = rough(crl.next_update - now) if crl.next_update > now else "over"
    return (view.name, crl.number, view.crl_revoked, when(crl.this_update), when(crl.next_update), left)


def _shown_crl(crl: PublishedCrl, view: AuthorityView) -> dict[str, object]:
    return {
        "authority_id": crl.authority_id,
        "name": view.name,
        "number": crl.number,
        "revoked": view.crl_revoked,
        "this_update": crl.this_update,
        "next_update": crl.next_update,
    }


def _duration(text: str) -> timedelta:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise InvalidInputError(f"--within: expected a duration as in 60s, got {text!r}") from error


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise InvalidInputError(f"cannot write {path}: {error.strerror}") from error
