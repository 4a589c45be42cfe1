"""Which CAs the enrolment server believes, kept in step with the registry, and what it tells devices to believe."""

import asyncio
import ssl

import psycopg
import structlog
from cryptography import x509
from psycopg_pool import PoolTimeout

from enrolment.tls import trust
from models.identity import AuthorityKind
from store.authorities import AuthorityStore
from store.engine import Database

EVERY_SECONDS = 2.0
"""A CA that is rolled over is announced long before it issues."""

log = structlog.get_logger("enrolment")


class Trust:
    """Claim and device CAs for client certificates; service and device CAs for `cacerts`."""

    def __init__(self, db: Database, context: ssl.SSLContext) -> None:
        self._authorities = AuthorityStore(db)
        self._context = context
        self._known: set[str] = set()
        self._issuers: dict[AuthorityKind, set[x509.Name]] = {}
        self.given_out: list[x509.Certificate] = []

    async def refresh(self) -> None:
        """Read them anew."""
        found = {kind: await self._authorities.trusted(kind) for kind in AuthorityKind}
        certificates = {
            kind: [x509.load_pem_x509_certificate(view.certificate.encode()) for view in views]
            for kind, views in found.items()
        }
        for kind in (AuthorityKind.CLAIM, AuthorityKind.DEVICE):
            new = [view for view in found[kind] if view.authority_id not in self._known]
            trust(self._context, (view.certificate for view in new))
            self._known.update(view.authority_id for view in new)
        self._issuers = {kind: {each.subject for each in those} for kind, those in certificates.items()}
        self.given_out = certificates[AuthorityKind.SERVICE] + certificates[AuthorityKind.DEVICE]

    def issued(self, certificate: x509.Certificate) -> bool:
        """Whether a claim or device CA that is believed now has this name; TLS has checked the signature."""
        return any(
            certificate.issuer in self._issuers.get(kind, ()) for kind in (AuthorityKind.CLAIM, AuthorityKind.DEVICE)
        )

    async def keep(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            try:
                await self.refresh()
            except (psycopg.OperationalError, PoolTimeout) as error:
                log.warning("cannot read the certificate authorities, going on with those known", reason=str(error))
