"""What can go wrong on a device, each with the class it is reported as.

```
TidegateError (models.errors)
├── BrickedError             no slot can be booted: the one state that must not be reachable
├── RecordError              a state record that is not what was written
├── CredentialError          a key or certificate that is missing or is not this device's
│   └── WipedError           its credentials were wiped by command
├── EnrolmentError           a request to the enrolment server
│   ├── EnrolmentRefusedError  it said no, and why; asking again at once brings nothing
│   └── EnrolmentAwayError   it did not answer, or has no answer yet
├── RotationError            ended with the old certificate
├── CommandError             a command that is not carried out
├── TaskError                `.failure_class`: a fleet job's task that has failed
├── UpdateError              `.failure_class`, reported to the gateway
│   ├── DownloadError        network    the bytes did not come
│   │   └── TooSlowError     network    they came more slowly than anyone should wait for
│   ├── ContentError         verify     the bytes came and are not the signed ones
│   └── FlashError           flash      the device's storage did not take them
└── RequestError             a request to the gateway
    ├── UnansweredError      no answer in time: it may have been carried out
    └── RejectedError        answered with an error code
```
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from models.errors import TidegateError
from models.protocol import FailureClass


class BrickedError(TidegateError):
    """No slot holds an image that verifies."""


class RecordError(TidegateError):
    """A state record is missing, torn or of another kind."""


class CredentialError(TidegateError):
    """A key or a certificate that is missing, or is not this device's."""


class WipedError(CredentialError):
    """The device was wiped: it has no credentials, and gets none until a person wants it to."""


class EnrolmentError(TidegateError):
    """A request to the enrolment server that brought no certificate."""


class EnrolmentRefusedError(EnrolmentError):
    """The server's no. `status` is the HTTP status."""

    def __init__(self, request: str, status: int, reason: str) -> None:
        self.status = status
        self.reason = reason
        super().__init__(f"{request} was refused ({status}): {reason:.300}")


class EnrolmentAwayError(EnrolmentError):
    """No answer in time, or none yet. Repeating the request is safe: the same key gets the same certificate."""

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__(message)


class RotationError(TidegateError):
    """A rotation that ended with the old certificate; the reason is for the server."""


class CommandError(TidegateError):
    """A command that this device does not carry out: unreadable, unsigned, for another device, or over."""


class TaskError(TidegateError):
    """A task that has failed on this device."""

    def __init__(self, failure_class: FailureClass, reason: str) -> None:
        self.failure_class = failure_class
        super().__init__(reason)


class UpdateError(TidegateError):
    """An update that has failed on this device."""

    failure_class: ClassVar[FailureClass] = FailureClass.INTERNAL


class DownloadError(UpdateError):
    """The artifact could not be had."""

    failure_class: ClassVar[FailureClass] = FailureClass.NETWORK


class TooSlowError(DownloadError):
    """Below the least average rate: given up at once, since a server that wants to hold a device can always send a byte."""


class ContentError(UpdateError):
    """What was had is not what was signed."""

    failure_class: ClassVar[FailureClass] = FailureClass.VERIFY


class FlashError(UpdateError):
    """The storage refused, is full, or gave back other bytes than were written."""

    failure_class: ClassVar[FailureClass] = FailureClass.FLASH


class RequestError(TidegateError):
    """A request to the gateway that brought no result."""


class UnansweredError(RequestError):
    """No answer in time; the request may have been carried out all the same."""


class RejectedError(RequestError):
    """The gateway's refusal. `state` is the current executionState where the answer carries one."""

    def __init__(self, request: str, code: str, message: str, state: Mapping[str, Any] | None = None) -> None:
        self.code = code
        self.state = state
        super().__init__(f"{request} was rejected: {code}: {message:.300}")
