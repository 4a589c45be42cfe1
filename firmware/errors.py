"""Every reason for which a device refuses an update, each with the failure class it is reported as.

```
VerificationError (models.errors)
└── FirmwareError               `.failure_class` is what a device reports
    ├── EnvelopeError           verify        not a DSSE envelope, of another type, or larger than any we make
    ├── SignatureError          verify        too few trusted keys have signed these bytes
    ├── StatementError          verify        signed, and still not a statement we can read
    ├── ExpiredError            verify        its time is over
    ├── MisdirectedError        verify        for another device, another job, or another release
    ├── ReplayError             verify        this attempt, or a later one, has ended before
    ├── DowngradeError          verify        security counter below the device's floor
    ├── IncompatibleError       incompatible  another product or hardware
    └── DeltaError              verify        a patch that is malformed, or whose result is not the signed image
        └── WrongBaseError      verify        a patch for another image than the one that runs
```
"""

from typing import ClassVar

from models.errors import VerificationError
from models.protocol import FailureClass


class FirmwareError(VerificationError):
    """An update that is not to be installed."""

    failure_class: ClassVar[FailureClass] = FailureClass.VERIFY


class EnvelopeError(FirmwareError):
    """Not an envelope we accept; nothing of it was verified."""


class SignatureError(FirmwareError):
    """Fewer trusted keys than required have signed exactly these bytes."""


class StatementError(FirmwareError):
    """The signed payload is not a statement in the one form we accept."""


class ExpiredError(FirmwareError):
    """The order or the release is no longer valid."""


class MisdirectedError(FirmwareError):
    """Valid, but not for this device, this job or this release."""


class ReplayError(FirmwareError):
    """An order that has had its day on this device."""


class DowngradeError(FirmwareError):
    """A release older, in the sense of the security counter, than what the device has confirmed."""


class IncompatibleError(FirmwareError):
    """A release for another product or other hardware."""

    failure_class: ClassVar[FailureClass] = FailureClass.INCOMPATIBLE


class DeltaError(FirmwareError):
    """A delta that cannot be applied; the full image is the way on."""


class WrongBaseError(DeltaError):
    """The image to patch is not the one the delta was made from."""
