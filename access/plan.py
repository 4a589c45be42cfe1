"""What a Mosquitto's files have to be, and who has to be thrown out for it. Pure: a snapshot, the files in force and the
time in; files, kicks and problems out.

A revocation list is installed only when it verifies, is in force by this machine's clock, and is no older than the one
that is installed; otherwise the installed one stays. A CA without any usable list is left out, and with it its devices:
Mosquitto would refuse them anyhow. A list file that is missing or cannot be read is the one thing that must never be:
then Mosquitto checks nothing.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from access.mosquitto import (
    DEVICE_ACL,
    DEVICE_CAS,
    DEVICE_CRLS,
    ENGINE_ACL,
    canary_topic,
    denied_in,
    device_acl,
    engine_acl,
)
from models.errors import RefusedError, VerificationError
from models.ids import THING_NAME
from pki.authority import read_certificate
from pki.revocation import CrlFacts, verify_crl
from store.brokers import AccessSnapshot, TrustedAuthority

HALF_LIFE, UNUSABLE = "crl-half-life", "crl-unusable"
"""Rules of alerts; their subject is `<broker>/<CA's name>`."""

_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?-----END [A-Z0-9 ]+-----\n?", re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """Something for an alert. `authority`: the CA's name."""

    rule: str
    authority: str
    text: str


@dataclass(frozen=True)
class AccessPlan:
    """What to bring a broker to.

    Attributes:
        files: every file's whole text, by name, in the order of writing.
        kicks: devices whose open session has to end: denied just now, or with a certificate that was not on the list.
        unlisted: revoked certificates that are on no list yet; they can still open a connection.
        crl_seconds_left: of each CA's list in force, by the CA's name.
    """

    revision: int
    files: Mapping[str, str]
    canary: str
    kicks: frozenset[str]
    denied: frozenset[str]
    unlisted: int
    problems: tuple[Problem, ...]
    crl_next_update: datetime | None
    crl_seconds_left: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Listed:
    """A CA with the list that is in force for it."""

    authority: TrustedAuthority
    crl: str
    facts: CrlFacts


def plan_access(snapshot: AccessSnapshot, installed: Mapping[str, str], broker_id: str, now: datetime) -> AccessPlan:
    """Decide.

    Args:
        installed: the files as they are, by name; nothing of one that is not there.

    Raises RefusedError when no CA has a usable list and none is installed: a broker would check nothing.
    """
    # A name that is none is in no certificate of ours; it must not keep the others from being denied.
    denied = frozenset(name for name in snapshot.denied if THING_NAME.fullmatch(name))
    before = _PEM.findall(installed.get(DEVICE_CRLS, ""))
    problems: list[Problem] = []
    listed = [one for authority in snapshot.authorities if (one := _choose(authority, before, now, problems))]
    problems += (problem for one in listed if (problem := _half_life(one, now)))
    files = _lists(listed, installed, problems) | {DEVICE_ACL: device_acl(denied)}
    generation = hashlib.sha256("\0".join(files.values()).encode()).hexdigest()[:16]
    canary = canary_topic(broker_id, generation)
    now_listed = {(one.authority.authority_id, serial) for one in listed for serial in one.facts.serials}
    return AccessPlan(
        revision=snapshot.revision,
        files=files | {ENGINE_ACL: engine_acl(canary)},
        canary=canary,
        kicks=(denied - denied_in(installed.get(DEVICE_ACL, ""))) | _newly_listed(snapshot, listed, before, now),
        denied=denied,
        unlisted=_unlisted(snapshot, now_listed),
        problems=tuple(problems),
        crl_next_update=min((one.facts.next_update for one in listed), default=None),
        crl_seconds_left={one.authority.name: (one.facts.next_update - now).total_seconds() for one in listed},
    )


def _lists(listed: list[_Listed], installed: Mapping[str, str], problems: list[Problem]) -> dict[str, str]:
    """The files of lists and CAs. Without any usable list those that are there stay: over, but read, they let nobody in."""
    if listed:
        return {
            DEVICE_CRLS: "".join(one.crl for one in listed),
            DEVICE_CAS: "".join(_whole(one.authority.certificate) for one in listed),
        }
    if installed.get(DEVICE_CRLS) and installed.get(DEVICE_CAS):
        return {name: installed[name] for name in (DEVICE_CRLS, DEVICE_CAS)}
    reasons = "; ".join(problem.text for problem in problems) or "there is none; 'starter.py ca init' makes it"
    raise RefusedError(f"cannot make the broker's files: no device CA has a usable revocation list: {reasons}")


def _choose(
    authority: TrustedAuthority, installed: list[str], now: datetime, problems: list[Problem]
) -> _Listed | None:
    """The newest list where it can be relied upon, else the installed one, else nothing."""
    kept = _installed_list(authority, installed, now)
    try:
        facts = _usable(authority, now)
    except VerificationError as error:
        verdict = "the one before stays in force" if kept else "its devices cannot connect"
        problems.append(Problem(UNUSABLE, authority.name, f"{error}; {verdict}; sign one with 'starter.py ca crl'"))
        return kept
    if kept and facts.number < kept.facts.number:
        text = f"revocation list {facts.number} of {authority.name} is older than {kept.facts.number}, which stays"
        problems.append(Problem(UNUSABLE, authority.name, text))
        return kept
    assert authority.crl is not None
    return _Listed(authority, _whole(authority.crl), facts)


def _usable(authority: TrustedAuthority, now: datetime) -> CrlFacts:
    if authority.crl is None:
        raise VerificationError(f"revocation list of {authority.name}: there is none")
    facts = verify_crl(authority.crl, read_certificate(authority.certificate), now)
    if facts.this_update > now:
        raise VerificationError(
            f"revocation list {facts.number} of {authority.name}: it begins at {facts.this_update:%H:%M:%S}Z and this "
            f"clock says {now:%H:%M:%S}Z; check the clock"
        )
    return facts


def _installed_list(authority: TrustedAuthority, installed: list[str], now: datetime) -> _Listed | None:
    ca = read_certificate(authority.certificate)
    for pem in installed:
        try:
            return _Listed(authority, _whole(pem), verify_crl(pem, ca, now))
        except VerificationError:
            continue  # another CA's, or over
    return None


def _half_life(one: _Listed, now: datetime) -> Problem | None:
    if now < one.facts.half_life:
        return None
    hours = (one.facts.next_update - now).total_seconds() / 3600
    return Problem(
        HALF_LIFE,
        one.authority.name,
        f"revocation list {one.facts.number} of {one.authority.name} has less than half its life left: it ends in "
        f"{hours:.1f} h, and then no device can connect; is a worker with the CA's key running? 'starter.py ca crl' "
        "signs one",
    )


def _newly_listed(snapshot: AccessSnapshot, listed: list[_Listed], before: list[str], now: datetime) -> frozenset[str]:
    """Devices with a certificate that was refused by no installed list and is by the new one."""
    fresh: set[tuple[str, str]] = set()
    for one in listed:
        kept = _installed_list(one.authority, before, now)
        known = kept.facts.serials if kept else frozenset()
        fresh |= {(one.authority.authority_id, serial) for serial in one.facts.serials - known}
    return frozenset(c.device_id for c in snapshot.revoked if (c.authority_id, c.serial_hex) in fresh)


def _unlisted(snapshot: AccessSnapshot, listed: set[tuple[str, str]]) -> int:
    """Of CAs that are not trusted any more nothing is counted: their certificates open nothing."""
    trusted = {authority.authority_id for authority in snapshot.authorities}
    return sum(c.authority_id in trusted and (c.authority_id, c.serial_hex) not in listed for c in snapshot.revoked)


def _whole(pem: str) -> str:
    return pem.strip() + "\n"
