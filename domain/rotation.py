"""Which certificates a rotation replaces, which are due, and how near the end one is. Pure.

A device may hold several valid certificates while they overlap. The newest that was seen to connect is the one it
certainly has; where none was, the oldest. What is newer than that one is on trial, what is older is superseded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from models.lifecycle import CertificatesSeen


@dataclass(frozen=True, slots=True)
class HeldCertificate:
    """A valid certificate of a device."""

    certificate_id: str
    generation: int
    confirmed: bool


def sort_certificates(held: Sequence[HeldCertificate], *, ask: bool) -> CertificatesSeen:
    """Where a rotation begins.

    Args:
        held: the device's valid certificates, at least one.
        ask: whether the device is going to be asked. Where it came by itself, and has shown the new certificate
            before anybody waited for it, all that is left is to revoke what that one replaces.
    """
    by_age = sorted(held, key=lambda each: each.generation)
    proved = next((each for each in reversed(by_age) if each.confirmed), by_age[0])
    new = [each for each in by_age if each.generation > proved.generation]
    if not ask and not new:
        others = [each.certificate_id for each in reversed(by_age) if each is not proved]
        return CertificatesSeen(old=tuple(others), settled=proved.certificate_id)
    old = [each for each in by_age if each.generation <= proved.generation]
    return CertificatesSeen(old=_ids(old), new=_ids(new))


def share_left(issued_at: datetime, not_after: datetime, now: datetime) -> int:
    """How much of a certificate's life is left, in percent, rounded down; 0 when it is over."""
    life, left = not_after - issued_at, not_after - now
    if life.total_seconds() <= 0 or left.total_seconds() <= 0:
        return 0
    return min(100, int(left * 100 // life))


def is_ending(share: int) -> bool:
    """Whether so little of a certificate's life is left that nothing may depend on it alone."""
    return share < ENDING_PERCENT


def ending_text(device_id: str, share: int, not_after: datetime, tried: str) -> str | None:
    """What an alert says of a certificate that nears its end, or None while there is time."""
    if not is_ending(share):
        return None
    left = f"{share} % of its life is left" if share else "its life is all but over"
    return (
        f"certificate of {device_id} ends {not_after:%Y-%m-%d %H:%M}Z, {left}, and {tried}; after that the device "
        "cannot renew it by itself and has to enrol again"
    )


ENDING_PERCENT = 20
"""From here on a device that does not come for a new certificate is a person's business: 18 days of 90."""


def _ids(certificates: Sequence[HeldCertificate]) -> tuple[str, ...]:
    """The newest first."""
    return tuple(each.certificate_id for each in reversed(certificates))
