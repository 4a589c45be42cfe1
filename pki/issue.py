"""Certificates from our own template: of devices, of claims, of services. No I/O, no clock.

Subject, usages and validity come from the caller and from here, never from a request. A device certificate says who the
device is, that it may open connections, and nothing else; it lives 90 days at most, begun a day before it was made.
"""

import ipaddress
import re
from collections.abc import Sequence
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from models.errors import InvalidInputError, RefusedError
from models.identity import MAX_CERTIFICATE_DAYS
from models.ids import BATCH_NAME, CLAIM_PREFIX, ENGINE_PREFIX, MAX_COMMON_NAME_CHARS, THING_NAME
from pki.authority import BACKDATED, Authority, key_usage
from pki.keys import DevicePublicKey, check_public_key, hash_for

_ENGINE_NAME = re.compile(re.escape(ENGINE_PREFIX) + r"[a-z0-9-]{1,40}")
_HOST_NAME = re.compile(
    r"(\*\.)?([a-zA-Z0-9_]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9_])?\.)*[a-zA-Z0-9_]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9_])?"
)


def issue_device(
    authority: Authority, public_key: DevicePublicKey, device_id: str, now: datetime, days: int = MAX_CERTIFICATE_DAYS
) -> x509.Certificate:
    """A device's certificate: CN is the device id, for client authentication alone.

    Its whole life, the back-dated day included, is at most `MAX_CERTIFICATE_DAYS`, and ends with the CA's at the latest.

    Raises:
        InvalidInputError: no thing name, too long for a common name, too many days, or a key that is not allowed.
        RefusedError: the CA's own life is over.
    """
    if not THING_NAME.fullmatch(device_id) or len(device_id) > MAX_COMMON_NAME_CHARS:
        raise InvalidInputError(
            f"cannot issue a certificate to {device_id!r}: expected a device id of 1 to {MAX_COMMON_NAME_CHARS} letters, "
            "digits and : _ -"
        )
    if not 1 <= days <= MAX_CERTIFICATE_DAYS:
        raise InvalidInputError(
            f"cannot issue a certificate of {days} days to {device_id}: expected 1 to {MAX_CERTIFICATE_DAYS}"
        )
    longest = now - BACKDATED + timedelta(days=MAX_CERTIFICATE_DAYS)
    ends = min(now + timedelta(days=days), longest)
    return _issue(authority, public_key, device_id, now, ends, [ExtendedKeyUsageOID.CLIENT_AUTH])


def issue_claim(
    authority: Authority, public_key: DevicePublicKey, batch: str, now: datetime, expires_at: datetime
) -> x509.Certificate:
    """A batch's claim certificate: CN `claim.<batch>`, for client authentication at the enrolment server alone.

    Raises InvalidInputError for a batch's name that is none, and for an end that is over or beyond the CA's own.
    """
    if not BATCH_NAME.fullmatch(batch):
        raise InvalidInputError(f"cannot issue a claim certificate to {batch!r}: expected a batch's name")
    if not now < expires_at <= authority.certificate.not_valid_after_utc:
        raise InvalidInputError(
            f"cannot issue a claim certificate to {batch} until {expires_at:%Y-%m-%d %H:%M}Z: expected a time to come, "
            f"and at the latest the end of the claim CA, {authority.certificate.not_valid_after_utc:%Y-%m-%d %H:%M}Z"
        )
    return _issue(authority, public_key, CLAIM_PREFIX + batch, now, expires_at, [ExtendedKeyUsageOID.CLIENT_AUTH])


def issue_service(
    authority: Authority,
    public_key: DevicePublicKey,
    common_name: str,
    hosts: Sequence[str],
    now: datetime,
    days: int,
    *,
    server: bool,
    client: bool,
) -> x509.Certificate:
    """A certificate of one of Tidegate's own services.

    Args:
        common_name: of a client `engine.<name>`, by which the broker knows it.
        hosts: names and addresses under which a server is reached; each becomes a subject alternative name.

    Raises InvalidInputError for names that are none, and for a server without hosts.
    """
    if client and not _ENGINE_NAME.fullmatch(common_name):
        raise InvalidInputError(
            f"cannot issue a service certificate to {common_name!r}: a client needs a name as in {ENGINE_PREFIX}gateway"
        )
    if not 0 < len(common_name) <= MAX_COMMON_NAME_CHARS or not common_name.isprintable():
        raise InvalidInputError(
            f"cannot issue a service certificate to {common_name!r}: expected 1 to {MAX_COMMON_NAME_CHARS} characters"
        )
    if not (server or client) or (server and not hosts) or days < 1:
        raise InvalidInputError(
            f"cannot issue a service certificate to {common_name}: expected a use (server, client or both), hosts for "
            f"a server, and at least one day; got server={server}, client={client}, hosts={list(hosts)}, days={days}"
        )
    usages = [ExtendedKeyUsageOID.SERVER_AUTH] * server + [ExtendedKeyUsageOID.CLIENT_AUTH] * client
    return _issue(authority, public_key, common_name, now, now + timedelta(days=days), usages, [*map(_host, hosts)])


def _issue(
    authority: Authority,
    public_key: DevicePublicKey,
    common_name: str,
    now: datetime,
    ends: datetime,
    usages: list[x509.ObjectIdentifier],
    hosts: Sequence[x509.GeneralName] = (),
) -> x509.Certificate:
    """The template."""
    ca = authority.certificate
    if now >= ca.not_valid_after_utc:
        raise RefusedError(
            f"cannot issue a certificate to {common_name}: {ca.subject.rfc4514_string()} has ended at "
            f"{ca.not_valid_after_utc:%Y-%m-%d %H:%M}Z; 'starter.py ca roll' makes its successor"
        )
    key = check_public_key(public_key)
    now, ends = now.replace(microsecond=0), ends.replace(microsecond=0)
    issuer_key = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(ca.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(min(ends, ca.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key), critical=False)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    return builder.sign(authority.key, hash_for(authority.key))


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST_NAME.fullmatch(host) or len(host) > 253:
            raise InvalidInputError(f"not a host name or address: {host!r}") from None
        return x509.DNSName(host)
