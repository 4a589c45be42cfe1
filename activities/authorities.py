"""Certificate authorities at work: making them, rolling them over, publishing their revocation lists.

```python
authorities = await ensure_authorities(db, keys, datetime.now(UTC), actor="alice")
authorities[AuthorityKind.DEVICE].certificate  # PEM
```

`AuthorityActivities` sign, and run where the keys are (the CA queue). `AuthorityWatch` does not, and runs in any worker:
that nobody signs has to be noticed where somebody runs.
"""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property

import structlog
from psycopg import AsyncConnection
from temporalio import activity

from activities.signing import CRL_LIFETIME, Issuers, signed_crl
from models.errors import RefusedError, TidegateError, UnavailableError, VerificationError
from models.identity import (
    AuthorityKind,
    AuthorityState,
    AuthorityView,
    CheckAuthoritiesInput,
    CheckAuthoritiesResult,
    PublishCrlsInput,
    PublishCrlsResult,
    PublishedCrlFacts,
)
from pki.authority import AUTHORITY_DAYS, Authority, authority_name, make_authority, read_certificate
from pki.revocation import CrlFacts, verify_crl, why_due
from pki.signer import KeyStore
from store.access import change_access
from store.alerts import raise_alert, resolve_alert
from store.audit import append_audit
from store.authorities import (
    AuthorityStore,
    NewAuthority,
    create_authority,
    crl_of,
    hold_for_crl,
    revoked_of,
    save_crl,
    trusted_authorities,
)
from store.engine import Database

UPKEEP = "upkeep"
"""Who acts, in the audit, when nobody asked."""

CRL_NOT_SIGNED, CRL_NOT_RENEWED, AUTHORITY_ENDING = "crl-not-signed", "crl-not-renewed", "authority-ending"
"""Rules of alerts; the subject is the authority's name."""

ENDING = timedelta(days=270)
"""Alert so long before the CA that issues ends: three lives of a device certificate, to roll over and rotate in."""

ROLL_POLL = timedelta(milliseconds=250)

_WHAT_IS_DUE = PublishCrlsInput()

log = structlog.get_logger()


@dataclass
class AuthorityActivities:
    """Collaborators: PostgreSQL, and the keys."""

    db: Database
    keys: KeyStore
    crl_lifetime: timedelta = CRL_LIFETIME

    @cached_property
    def _issuers(self) -> Issuers:
        return Issuers(self.keys)

    @activity.defn
    async def publish_crls(self, asked: PublishCrlsInput = _WHAT_IS_DUE) -> PublishCrlsResult:
        """Sign the list of each device CA where certificates were revoked, or a quarter of the newest's life is over.

        Idempotent: a list that names all that is revoked and is young stands. One at a time for each CA: who comes second
        finds what the first has signed, so revocations that come together share a list.
        """
        result = await self.publish(asked)
        for one in result.signed:
            log.info("revocation list signed", authority=one.name, number=one.number, reason=one.reason)
        for text in result.failed:
            log.error("revocation list not signed", reason=text)
        return result

    async def publish(self, asked: PublishCrlsInput) -> PublishCrlsResult:
        """The same, for whoever is no worker.

        What a key that is not here prevents is an alert and stands in `failed`; what may pass (a signer, PostgreSQL)
        raises, after the other CAs had their turn.
        """
        signed: list[PublishedCrlFacts] = []
        failed: list[str] = []
        passing: list[Exception] = []
        views = await AuthorityStore(self.db).trusted(AuthorityKind.DEVICE)
        for view in views:
            try:
                facts = await self._publish(view.authority_id, asked)
            except UnavailableError as error:
                passing.append(error)
            except TidegateError as error:
                failed.append(f"{view.name}: {error}")
                await self._alert(view, str(error))
            except Exception as error:
                passing.append(error)
            else:
                signed += [facts] if facts else []
        if passing:
            raise passing[0]
        standing = len(views) - len(signed) - len(failed)
        return PublishCrlsResult(signed=tuple(signed), standing=standing, failed=tuple(failed))

    async def _publish(self, authority_id: str, asked: PublishCrlsInput) -> PublishedCrlFacts | None:
        """One transaction: what is revoked is read after the CA is held, so nothing that committed before is missed."""
        async with self.db.pool.connection() as connection:
            view = await hold_for_crl(connection, authority_id)
            if view is None:
                return None
            now, revoked = datetime.now(UTC), await revoked_of(connection, authority_id)
            serials = frozenset(one.serial_hex for one in revoked)
            newest, wrong = await _newest(connection, view, now)
            reason = wrong or why_due(newest, serials, now, self.crl_lifetime)
            if reason is None and not asked.force:
                return None
            authority = await self._issuers.open(view)
            crl = await signed_crl(authority, view.crl_number + 1, revoked, now, self.crl_lifetime)
            await save_crl(connection, authority_id, crl)
            published = PublishedCrlFacts(
                authority_id=authority_id,
                name=view.name,
                number=crl.facts.number,
                revoked=len(crl.facts.serials),
                next_update=crl.facts.next_update,
                reason=reason or "asked for",
            )
            details = published.model_dump(mode="json", exclude={"authority_id", "reason"})
            await append_audit(
                connection, asked.actor, "crl.signed", "authority", authority_id, published.reason, details
            )
            await resolve_alert(connection, CRL_NOT_SIGNED, view.name, UPKEEP)
        return published

    async def _alert(self, view: AuthorityView, why: str) -> None:
        text = f"no revocation list of {view.name} can be signed: {why}"
        async with self.db.pool.connection() as connection:
            await raise_alert(connection, CRL_NOT_SIGNED, view.name, text)


@dataclass
class AuthorityWatch:
    """Looks after authorities without their keys."""

    db: Database

    @activity.defn
    async def check_authorities(self, asked: CheckAuthoritiesInput) -> CheckAuthoritiesResult:
        """Raise, and resolve, alerts for lists past half of their life and for authorities that end.

        Idempotent: one alert for each rule and authority stands.
        """
        now, texts = datetime.now(UTC), []
        store = AuthorityStore(self.db)
        lists = {crl.authority_id: crl for crl in await store.newest_crls()}
        for view in await store.find():
            crl = lists.get(view.authority_id)
            late = crl is not None and now >= crl.this_update + (crl.next_update - crl.this_update) / 2
            ending = view.state is AuthorityState.ACTIVE and now >= view.not_after - ENDING
            texts += [
                await self._tell(CRL_NOT_RENEWED, view, late, _late(view, crl.next_update, now) if crl else ""),
                await self._tell(AUTHORITY_ENDING, view, ending, _ending(view)),
            ]
        return CheckAuthoritiesResult(alerts=tuple(text for text in texts if text))

    async def _tell(self, rule: str, view: AuthorityView, stands: bool, text: str) -> str:
        async with self.db.pool.connection() as connection:
            if stands:
                await raise_alert(connection, rule, view.name, text)
                return text
            await resolve_alert(connection, rule, view.name, UPKEEP)
            return ""


async def ensure_authorities(
    db: Database,
    keys: KeyStore,
    now: datetime,
    actor: str,
    *,
    days: int = AUTHORITY_DAYS,
    crl_lifetime: timedelta = CRL_LIFETIME,
) -> dict[AuthorityKind, AuthorityView]:
    """The active CA of each kind, made where it is missing; the device CA with its first revocation list.

    Idempotent, and safe against others that do the same now: the exclusive lock of access is held while they are made.
    Every key is opened once, so that a key that is missing is found out here rather than at the first device.

    Raises NotFoundError, InvalidInputError where a CA is known whose key the store cannot open.
    """
    found = await _active(db)
    if len(found) < len(AuthorityKind):
        async with db.pool.connection() as connection:
            await change_access(connection)
            for kind in AuthorityKind:
                known = await trusted_authorities(connection, kind)
                if not any(view.state is AuthorityState.ACTIVE for view in known):
                    made = await new_authority(keys, kind, now, days=days, crl_lifetime=crl_lifetime)
                    await create_authority(connection, made, actor)
        found = await _active(db)
    issuers = Issuers(keys)
    for view in found.values():
        await issuers.open(view)
    return found


async def new_authority(
    keys: KeyStore,
    kind: AuthorityKind,
    now: datetime,
    *,
    days: int = AUTHORITY_DAYS,
    crl_lifetime: timedelta = CRL_LIFETIME,
) -> NewAuthority:
    """A new key and its certificate; nobody knows of it yet. A device CA has its first, empty revocation list."""
    key_reference, key = await asyncio.to_thread(keys.create)
    name = authority_name(kind)
    certificate = await asyncio.to_thread(make_authority, kind, name, key, now, days)
    crl = None
    if kind is AuthorityKind.DEVICE:
        crl = await signed_crl(Authority(certificate, key), 1, [], now, crl_lifetime)
    return NewAuthority(kind, name, certificate, key_reference, crl)


async def announce_authority(
    db: Database,
    keys: KeyStore,
    kind: AuthorityKind,
    actor: str,
    reason: str = "",
    *,
    days: int = AUTHORITY_DAYS,
    crl_lifetime: timedelta = CRL_LIFETIME,
) -> tuple[AuthorityView, int]:
    """The successor of the CA that issues, believed and not issuing yet, made where there is none; and the revision of
    access that brokers have to have reached before it may issue.

    Raises NotFoundError where there is none to succeed.
    """
    store = AuthorityStore(db)
    await store.active(kind)
    if known := await store.announced(kind):
        return known, await store.revision()
    made = await new_authority(keys, kind, datetime.now(UTC), days=days, crl_lifetime=crl_lifetime)
    return await store.announce(made, actor, reason)


async def activate_authority(
    db: Database, view: AuthorityView, revision: int, actor: str, reason: str = "", *, within: timedelta
) -> AuthorityView:
    """Let an announced CA issue, once every broker enforces `revision`, so that no device of it is turned away.

    Raises RefusedError naming the brokers that did not catch up; the CA stays announced, and this may be tried again.
    """
    store = AuthorityStore(db)
    deadline = asyncio.get_running_loop().time() + within.total_seconds()
    while behind := await store.brokers_behind(revision):
        if asyncio.get_running_loop().time() >= deadline:
            raise RefusedError(
                f"cannot let {view.name} issue: {', '.join(behind)} did not take up revision {revision} within "
                f"{within.total_seconds():.0f} s and would turn its devices away; it stays announced, repair the broker "
                f"and say 'starter.py ca roll {view.kind}' again"
            )
        await asyncio.sleep(ROLL_POLL.total_seconds())
    return await store.activate(view.authority_id, actor, reason)


async def _active(db: Database) -> dict[AuthorityKind, AuthorityView]:
    views = await AuthorityStore(db).find()
    active = {view.kind: view for view in views if view.state is AuthorityState.ACTIVE}
    return {kind: active[kind] for kind in AuthorityKind if kind in active}


async def _newest(connection: AsyncConnection, view: AuthorityView, now: datetime) -> tuple[CrlFacts | None, str]:
    """The newest list, or why it does not hold: then the next one is signed at once."""
    pem = await crl_of(connection, view.authority_id, view.crl_number)
    try:
        return await asyncio.to_thread(verify_crl, pem or b"", read_certificate(view.certificate), now), ""
    except VerificationError as error:
        return None, str(error)


def _late(view: AuthorityView, ends: datetime, now: datetime) -> str:
    hours = (ends - now).total_seconds() / 3600
    left = f"ends in {hours:.1f} h" if hours > 0 else f"has ended {-hours:.1f} h ago"
    return (
        f"the revocation list of {view.name} is past half of its life and {left} ({ends:%Y-%m-%d %H:%M}Z); brokers then "
        "refuse every device of it; look for a worker with the CA's keys, or say 'starter.py ca crl --sign'"
    )


def _ending(view: AuthorityView) -> str:
    return (
        f"the {view.kind} CA {view.name} ends at {view.not_after:%Y-%m-%d %H:%M}Z, and nothing it has signed lives "
        f"longer; 'starter.py ca roll {view.kind}' makes its successor"
    )
