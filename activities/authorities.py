"""Certificate authorities at work: making them, rolling them over, publishing their revocation lists.

```python
authorities = await ensure_authorities(db, keys, datetime.now(UTC), actor="alice")
authorities[AuthorityKind.DEVICE].certificate  # PEM
```
"""

import asyncio
from datetime import datetime, timedelta

from activities.signing import CRL_LIFETIME, Issuers, signed_crl
from models.identity import AuthorityKind, AuthorityState, AuthorityView
from pki.authority import AUTHORITY_DAYS, Authority, authority_name, make_authority
from pki.signer import KeyStore
from store.access import change_access
from store.authorities import AuthorityStore, NewAuthority, create_authority, trusted_authorities
from store.engine import Database


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


async def _active(db: Database) -> dict[AuthorityKind, AuthorityView]:
    views = await AuthorityStore(db).find()
    return {view.kind: view for view in views if view.state is AuthorityState.ACTIVE}
