"""Whether a device's standing allows what is asked of its identity, and if not, why. Pure: a sentence, or None.

Workflows' first activities ask it under the lock of the device's row, the command line asks it before it starts them.
"""

from dataclasses import dataclass
from datetime import datetime

from models.device import DeviceStatus


@dataclass(frozen=True, slots=True)
class Standing:
    """A device as far as its identity goes."""

    device_id: str
    serial_number: str
    status: DeviceStatus
    barred_at: datetime | None = None
    barred_reason: str | None = None
    valid_certificates: int = 0
    buried: bool = False
    """Its serial number has a tombstone that nobody has lifted."""

    @property
    def is_heard(self) -> bool:
        """Whether anything it says would be used."""
        return self.barred_at is None and self.status is not DeviceStatus.RETIRED


def why_not_configure(device: Standing) -> str | None:
    """Why a device cannot be given a configuration."""
    return _why_not("configure", device)


def why_not_want(device: Standing) -> str | None:
    """Why nothing can be wanted of a device's shadow."""
    return _why_not("change the shadow of", device)


def why_not_rotate(device: Standing) -> str | None:
    """Why a device cannot be asked for a new key."""
    refused = _why_not("rotate the certificate of", device)
    if refused is None and not device.valid_certificates:
        return (
            f"cannot rotate the certificate of {device.device_id}: it has none that is valid, and without one it "
            "cannot ask for another; it has to enrol again"
        )
    return refused


def why_not_decommission(device: Standing) -> str | None:
    """Why there is nothing to decommission. What is retired in the registry alone can be: its identity still stands."""
    if device.status is DeviceStatus.RETIRED and device.buried and not device.valid_certificates:
        return f"cannot decommission {device.device_id}: it is retired already; 'device show' says since when"
    return None


def why_not_unbar(device: Standing) -> str | None:
    """Why a device's word cannot count again."""
    if device.barred_at is None:
        return f"cannot unbar {device.device_id}: it is not barred"
    if device.status is DeviceStatus.RETIRED:
        return _why_not("unbar", device)
    if not device.valid_certificates:
        return f"cannot unbar {device.device_id}: it has no valid certificate; it has to enrol again"
    return None


def _why_not(verb: str, device: Standing) -> str | None:
    if device.status is DeviceStatus.RETIRED:
        return (
            f"cannot {verb} {device.device_id}: it is retired; its serial number can enrol again after "
            f"'device release {device.serial_number}'"
        )
    if device.barred_at is not None:
        since = f"{device.barred_at:%Y-%m-%d %H:%M:%S}Z"
        return (
            f"cannot {verb} {device.device_id}: nothing that it says is used since {since} "
            f"({device.barred_reason or 'no reason given'}); it has to enrol again, or be decommissioned"
        )
    return None
