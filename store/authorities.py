"""Certificate authorities and their revocation lists, as PostgreSQL has them. Keys are elsewhere (pki/signer.py).

Of each kind one authority is ACTIVE and issues; the constraint `authorities_one_active` sees to it. Brokers and the
enrolment server believe those that are ACTIVE or TRUSTED. A new one is announced as TRUSTED, so that everybody believes
it before it issues, and then takes over; the old one stays TRUSTED until nothing of it is in use, and is RETIRED.

Whoever changes what is trusted changes who may speak: `store.access.change_access` comes first in each transaction, and
a device CA comes with its first revocation list, because OpenSSL refuses every device of a CA that has none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from psycopg import AsyncConnection
from psycopg.rows import class_row

from models.errors import ConflictError, NotFoundError, RefusedError
from models.identity import AuthorityKind, AuthorityState, AuthorityView, RevocationReason
from pki.authority import certificate_id, pem_of
from pki.revocation import CrlFacts, Revoked
from store.access import CHANNEL, change_access
from store.audit import append_audit
from store.engine import Database, fetch_one

CRLS_KEPT = 10
"""Of each CA. Only the newest is used; the others are for whoever asks what was published."""

_SELECT = """
SELECT a.authority_id, a.kind, a.name, a.state, a.not_before, a.not_after, a.certificate, a.key_reference, a.crl_number,
       c.next_update AS crl_next_update, c.revoked AS crl_revoked
FROM authorities a LEFT JOIN crls c ON c.authority_id = a.authority_id AND c.number = a.crl_number
"""
_ORDER = " ORDER BY a.kind, array_position(ARRAY['active','trusted','retired'], a.state), a.created_at DESC"

_INSERT = """
INSERT INTO authorities (authority_id, kind, name, certificate, key_reference, state, not_before, not_after, created_by)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
"""

_REVOKED = """
SELECT serial_hex, revoked_at, revocation_reason FROM certificates
WHERE authority_id = %s AND state = 'revoked' AND not_after > now() - interval '1 day'
"""
"""What has ended by itself needs no entry; the day is for clocks that are behind."""

_CUT_OFF = """
WITH ended AS (
    UPDATE certificates SET state = 'revoked', revoked_at = now(), revocation_reason = %(reason)s
    WHERE authority_id = %(authority)s AND state = 'valid' RETURNING certificate_id, device_id
), noted AS (
    INSERT INTO audit_events (actor, action, subject_kind, subject, reason, details)
    SELECT %(actor)s, 'certificate.revoked', 'device', device_id, %(text)s,
           jsonb_build_object('certificate_id', certificate_id, 'rfc5280', %(reason)s::text)
    FROM ended
), barred AS (
    UPDATE devices d SET barred_at = now(), barred_reason = %(text)s, updated_at = now()
    WHERE d.barred_at IS NULL AND d.device_id IN (SELECT device_id FROM ended)
      AND NOT EXISTS (SELECT FROM certificates c WHERE c.device_id = d.device_id AND c.state = 'valid'
                      AND c.not_after > now() AND c.authority_id <> %(authority)s)
    RETURNING d.device_id
), noted_too AS (
    INSERT INTO audit_events (actor, action, subject_kind, subject, reason)
    SELECT %(actor)s, 'device.barred', 'device', device_id, %(text)s FROM barred
)
SELECT count(*) FROM ended
"""


@dataclass(frozen=True)
class SignedCrl:
    """A list as PEM, and what it says."""

    pem: bytes
    facts: CrlFacts


@dataclass(frozen=True)
class NewAuthority:
    """A CA that was made and is not known yet. `crl`: its first list, which a CA of devices has to have."""

    kind: AuthorityKind
    name: str
    certificate: x509.Certificate
    key_reference: str
    crl: SignedCrl | None = None


@dataclass(frozen=True)
class PublishedCrl:
    """The newest list of a CA that is believed."""

    authority_id: str
    number: int
    pem: str
    this_update: datetime
    next_update: datetime


class AuthorityStore:
    """Authorities in PostgreSQL."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def active(self, kind: AuthorityKind) -> AuthorityView:
        """The one that issues. Raises NotFoundError saying how to make it."""
        async with self._db.pool.connection() as connection:
            return await active_authority(connection, kind)

    async def trusted(self, kind: AuthorityKind) -> list[AuthorityView]:
        """Those that are believed: the active one first, then what was before it or comes after it."""
        async with self._db.pool.connection() as connection:
            return await trusted_authorities(connection, kind)

    async def find(self, kind: AuthorityKind | None = None) -> list[AuthorityView]:
        """All of them, by kind; the active one first."""
        async with self._db.pool.connection() as connection:
            return await _find(connection, "WHERE %s::text IS NULL OR a.kind = %s", (kind, kind))

    async def get(self, authority_id: str) -> AuthorityView:
        """One by its id or its beginning, or by its name. Raises NotFoundError, ConflictError where several begin so."""
        async with self._db.pool.connection() as connection:
            return await _named(connection, authority_id)

    async def create(self, new: NewAuthority, actor: str, reason: str = "") -> AuthorityView:
        """The first of its kind, which issues at once. Raises ConflictError where one is active."""
        async with self._db.pool.connection() as connection:
            await change_access(connection)
            return await create_authority(connection, new, actor, reason)

    async def announce(self, new: NewAuthority, actor: str, reason: str = "") -> tuple[AuthorityView, int]:
        """One that is believed and does not issue yet; and the revision of access that brokers have to have reached
        before it may."""
        async with self._db.pool.connection() as connection:
            revision = await change_access(connection)
            await _insert(connection, new, AuthorityState.TRUSTED, actor)
            view = await _named(connection, certificate_id(new.certificate))
            await _note(connection, actor, "authority.announced", view, reason)
            return view, revision

    async def activate(self, authority_id: str, actor: str, reason: str = "") -> AuthorityView:
        """The announced one takes over, and the active one is believed only. Idempotent.

        Raises RefusedError for a retired one.
        """
        async with self._db.pool.connection() as connection:
            await change_access(connection)
            return await _activate(connection, await _locked(connection, authority_id), actor, reason)

    async def roll(self, new: NewAuthority, actor: str, reason: str = "") -> AuthorityView:
        """Announce and activate at once: where nobody has to be told before, as on a machine of one's own."""
        async with self._db.pool.connection() as connection:
            await change_access(connection)
            await _insert(connection, new, AuthorityState.TRUSTED, actor)
            view = await _named(connection, certificate_id(new.certificate))
            await _note(connection, actor, "authority.announced", view, reason)
            return await _activate(connection, view, actor, reason)

    async def retire(
        self, authority_id: str, actor: str, reason: str = "", *, cut_off: bool = False
    ) -> tuple[AuthorityView, int]:
        """Nobody believes it any more, and it publishes no lists; and how many device certificates were revoked for it.

        Args:
            cut_off: also where certificates of it are in use. Those of devices are revoked in the same transaction, and
                devices that have no other are barred.

        Raises RefusedError for the active one, and, without `cut_off`, where certificates of it are in use. Idempotent.
        """
        async with self._db.pool.connection() as connection:
            await change_access(connection)
            view = await _locked(connection, authority_id)
            if view.state is AuthorityState.RETIRED:
                return view, 0
            if view.state is AuthorityState.ACTIVE:
                raise RefusedError(
                    f"cannot retire {view.name}: it is the {view.kind} CA that issues; 'starter.py ca roll "
                    f"{view.kind}' makes its successor first"
                )
            in_use = await _in_use(connection, view)
            if in_use and not cut_off:
                raise RefusedError(
                    f"cannot retire {view.name}: {in_use}; rotate or disable them first, or say --cut-off to end them "
                    "with it"
                )
            ended = await _cut_off(connection, view, actor, reason or f"{view.name} was retired")
            await connection.execute(
                "UPDATE authorities SET state = 'retired', retired_at = now() WHERE authority_id = %s",
                (view.authority_id,),
            )
            await _note(connection, actor, "authority.retired", view, reason, certificates_revoked=ended)
            return await _named(connection, view.authority_id), ended

    async def announced(self, kind: AuthorityKind) -> AuthorityView | None:
        """The successor that is believed and does not issue yet, where there is one; the newest."""
        async with self._db.pool.connection() as connection:
            found = await _find(
                connection,
                "WHERE a.kind = %s AND a.state = 'trusted' AND a.created_at > (SELECT created_at FROM authorities "
                "WHERE kind = %s AND state = 'active')",
                (kind, kind),
            )
            return found[0] if found else None

    async def brokers_behind(self, revision: int) -> list[str]:
        """Brokers that were seen lately and enforce less than this revision of access."""
        async with self._db.pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT broker_id FROM brokers WHERE applied_revision < %s AND seen_at > now() - interval '10 minutes' "
                "ORDER BY broker_id",
                (revision,),
            )
            return [row[0] for row in await cursor.fetchall()]

    async def revision(self) -> int:
        """The newest revision of access."""
        async with self._db.pool.connection() as connection:
            return int((await fetch_one(connection, "SELECT revision FROM access_state", ()))[0])

    async def newest_crls(self) -> list[PublishedCrl]:
        """The newest list of each device CA that is believed."""
        async with self._db.pool.connection() as connection:
            return await newest_crls(connection)


async def active_authority(connection: AsyncConnection, kind: AuthorityKind, *, hold: bool = False) -> AuthorityView:
    """The one that issues. With `hold` it is not retired before this transaction ends.

    Raises NotFoundError saying how to make it.
    """
    locked = " FOR KEY SHARE OF a" if hold else ""
    async with connection.cursor(row_factory=class_row(AuthorityView)) as cursor:
        await cursor.execute(f"{_SELECT} WHERE a.kind = %s AND a.state = 'active'{locked}".encode(), (kind,))
        view = await cursor.fetchone()
    if view is None:
        raise NotFoundError(f"there is no {kind} CA that issues; run 'starter.py ca init'")
    return view


async def trusted_authorities(connection: AsyncConnection, kind: AuthorityKind) -> list[AuthorityView]:
    """As AuthorityStore.trusted, in a transaction of the caller's."""
    return await _find(connection, "WHERE a.kind = %s AND a.state <> 'retired'", (kind,))


async def newest_crls(connection: AsyncConnection) -> list[PublishedCrl]:
    """As AuthorityStore.newest_crls, in a transaction of the caller's."""
    async with connection.cursor(row_factory=class_row(PublishedCrl)) as cursor:
        await cursor.execute(
            "SELECT c.authority_id, c.number, c.pem, c.this_update, c.next_update FROM crls c "
            "JOIN authorities a ON a.authority_id = c.authority_id AND a.crl_number = c.number "
            "WHERE a.kind = 'device' AND a.state <> 'retired' ORDER BY a.created_at, a.authority_id"
        )
        return await cursor.fetchall()


async def create_authority(
    connection: AsyncConnection, new: NewAuthority, actor: str, reason: str = ""
) -> AuthorityView:
    """As AuthorityStore.create, in a transaction that has called `change_access`."""
    cursor = await connection.execute("SELECT name FROM authorities WHERE kind = %s AND state = 'active'", (new.kind,))
    if row := await cursor.fetchone():
        raise ConflictError(f"there is a {new.kind} CA already, {row[0]}; 'starter.py ca roll' makes its successor")
    await _insert(connection, new, AuthorityState.ACTIVE, actor)
    view = await active_authority(connection, new.kind)
    await _note(connection, actor, "authority.created", view, reason)
    return view


async def hold_for_crl(connection: AsyncConnection, authority_id: str) -> AuthorityView | None:
    """Take a device CA for signing its next list: one at a time. None where it is retired.

    Certificates are issued meanwhile; what is revoked meanwhile is for the next list, whose turn comes after this one.
    """
    async with connection.cursor(row_factory=class_row(AuthorityView)) as cursor:
        await cursor.execute(
            f"{_SELECT} WHERE a.authority_id = %s AND a.kind = 'device' AND a.state <> 'retired' "
            "FOR NO KEY UPDATE OF a".encode(),
            (authority_id,),
        )
        return await cursor.fetchone()


async def crl_of(connection: AsyncConnection, authority_id: str, number: int) -> str | None:
    """A list by its number."""
    cursor = await connection.execute(
        "SELECT pem FROM crls WHERE authority_id = %s AND number = %s", (authority_id, number)
    )
    row = await cursor.fetchone()
    return row[0] if row else None


async def revoked_of(connection: AsyncConnection, authority_id: str) -> list[Revoked]:
    """What a list of this CA has to name."""
    cursor = await connection.execute(_REVOKED, (authority_id,))
    unspecified = RevocationReason.UNSPECIFIED.value
    return [Revoked(row[0], row[1], RevocationReason(row[2] or unspecified)) for row in await cursor.fetchall()]


async def save_crl(connection: AsyncConnection, authority_id: str, crl: SignedCrl) -> None:
    """Publish a list; brokers are told. Call `hold_for_crl` before. Raises ConflictError where its number does not grow."""
    facts = crl.facts
    cursor = await connection.execute(
        "UPDATE authorities SET crl_number = %s WHERE authority_id = %s AND crl_number < %s",
        (facts.number, authority_id, facts.number),
    )
    if not cursor.rowcount:
        raise ConflictError(f"cannot publish revocation list {facts.number} of {authority_id[:16]}: it is not the next")
    await connection.execute(
        "INSERT INTO crls (authority_id, number, pem, revoked, this_update, next_update) VALUES (%s, %s, %s, %s, %s, %s)",
        (authority_id, facts.number, crl.pem.decode(), len(facts.serials), facts.this_update, facts.next_update),
    )
    await connection.execute(
        "DELETE FROM crls WHERE authority_id = %s AND number <= %s", (authority_id, facts.number - CRLS_KEPT)
    )
    await connection.execute("SELECT pg_notify(%s, '')", (CHANNEL,))


async def _find(connection: AsyncConnection, where: str, arguments: Sequence[object]) -> list[AuthorityView]:
    async with connection.cursor(row_factory=class_row(AuthorityView)) as cursor:
        await cursor.execute(f"{_SELECT} {where} {_ORDER}".encode(), arguments)
        return await cursor.fetchall()


async def _named(connection: AsyncConnection, name: str) -> AuthorityView:
    found = await _find(connection, "WHERE a.name = %s OR starts_with(a.authority_id, lower(%s))", (name, name or "-"))
    if not found:
        raise NotFoundError(f"no certificate authority {name!r}; 'starter.py ca show' lists them")
    if len(found) > 1:
        raise ConflictError(f"{len(found)} certificate authorities begin with {name!r}; give more of the id")
    return found[0]


async def _locked(connection: AsyncConnection, name: str) -> AuthorityView:
    """After this no certificate of it is being issued (`hold`), and none was that is not seen from here on."""
    view = await _named(connection, name)
    await connection.execute("SELECT FROM authorities WHERE authority_id = %s FOR UPDATE", (view.authority_id,))
    return await _named(connection, view.authority_id)


async def _insert(connection: AsyncConnection, new: NewAuthority, state: AuthorityState, actor: str) -> None:
    if new.kind is AuthorityKind.DEVICE and new.crl is None:
        raise ConflictError(f"cannot add {new.name}: a device CA comes with its first revocation list")
    certificate = new.certificate
    values = (
        certificate_id(certificate),
        new.kind,
        new.name,
        pem_of(certificate),
        new.key_reference,
        state,
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        actor,
    )
    await connection.execute(_INSERT, values)
    if new.crl is not None:
        await save_crl(connection, certificate_id(certificate), new.crl)


async def _activate(connection: AsyncConnection, view: AuthorityView, actor: str, reason: str) -> AuthorityView:
    if view.state is AuthorityState.ACTIVE:
        return view
    if view.state is AuthorityState.RETIRED:
        raise RefusedError(
            f"cannot let {view.name} issue: it is retired; 'starter.py ca roll {view.kind}' makes another"
        )
    cursor = await connection.execute(
        "UPDATE authorities SET state = 'trusted' WHERE kind = %s AND state = 'active' RETURNING name", (view.kind,)
    )
    before = [row[0] for row in await cursor.fetchall()]
    await connection.execute("UPDATE authorities SET state = 'active' WHERE authority_id = %s", (view.authority_id,))
    await _note(connection, actor, "authority.activated", view, reason, before=before)
    return await active_authority(connection, view.kind)


async def _in_use(connection: AsyncConnection, view: AuthorityView) -> str:
    """What would end with it, in words; empty for nothing that is known of."""
    if view.kind is AuthorityKind.DEVICE:
        cursor = await connection.execute(
            "SELECT count(*) FROM certificates WHERE authority_id = %s AND state = 'valid' AND not_after > now()",
            (view.authority_id,),
        )
        row = await cursor.fetchone()
        return f"{row[0]} device certificates of it are valid" if row and row[0] else ""
    if view.kind is AuthorityKind.CLAIM:
        cursor = await connection.execute(
            "SELECT name, claim_certificate FROM claim_batches WHERE disabled_at IS NULL AND expires_at > now()"
        )
        subject = x509.load_pem_x509_certificate(view.certificate.encode()).subject
        batches = [
            row[0]
            for row in await cursor.fetchall()
            if x509.load_pem_x509_certificate(row[1].encode()).issuer == subject
        ]
        return f"the claim certificates of {', '.join(sorted(batches))} are of it" if batches else ""
    return ""


async def _cut_off(connection: AsyncConnection, view: AuthorityView, actor: str, text: str) -> int:
    if view.kind is not AuthorityKind.DEVICE:
        return 0
    arguments = {
        "authority": view.authority_id,
        "reason": RevocationReason.CESSATION_OF_OPERATION.value,
        "actor": actor,
        "text": text,
    }
    row = await (await connection.execute(_CUT_OFF, arguments)).fetchone()
    return int(row[0]) if row else 0


async def _note(
    connection: AsyncConnection, actor: str, action: str, view: AuthorityView, reason: str, **details: object
) -> None:
    await append_audit(
        connection,
        actor,
        action,
        "authority",
        view.authority_id,
        reason,
        {"kind": view.kind, "name": view.name, **details},
    )
