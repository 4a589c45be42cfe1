"""The rotation of a device's certificate as a process that can be cut anywhere and goes on where it was.

`rotate` is called with a cause (a command's id) as often as it takes: what has been done is read from the credentials,
never from memory. `settle` ends a rotation whose last word is missing: it asks the server about the certificate that is
used, and keeps both until there is a clear answer.

What it is not: a client. `server` is asked for certificates, `prove` connects to the broker with one.
"""

from collections.abc import Awaitable, Callable

from agent.credentials import Credentials, Pair, make_request
from agent.enrolment import Enroller
from agent.errors import CredentialError, EnrolmentAwayError, EnrolmentError, EnrolmentRefusedError, RotationError

Prove = Callable[[Pair], Awaitable[bool]]
"""Connects to the broker with a pair. False: it could not, however often it was tried."""


_NOT_YOURS = (401, 403)
"""The server knows the certificate and refuses it for good: revoked, or of nobody."""


class Rotation:
    """Rotates the certificate of one device. `serial_number` goes into the request, for whoever reads it."""

    def __init__(self, credentials: Credentials, server: Enroller, serial_number: str, prove: Prove) -> None:
        self._credentials = credentials
        self._server = server
        self._serial_number = serial_number
        self._prove = prove

    async def rotate(self, cause: str) -> None:
        """Bring the device to a new certificate for this cause; returns when the old one is gone.

        Raises:
            RotationError: it did not come to that, and the device goes on with the old certificate.
            EnrolmentAwayError: the server is away; call it again, nothing is lost.
        """
        await self.settle()
        credentials = self._credentials
        if credentials.record.cause == cause:
            return
        request = make_request(credentials.prepare(cause), self._serial_number)
        if not credentials.record.next_ready:
            try:
                credentials.keep(await self._server.reenroll(self._current(), request))
            except EnrolmentAwayError:
                raise
            except (EnrolmentError, CredentialError) as error:
                credentials.drop_next()
                raise RotationError(f"no new certificate: {error}") from error
        pair = self._next()
        if not await self._prove(pair):
            credentials.drop_next()
            raise RotationError("the broker could not be reached with the new certificate; the old one stays")
        credentials.promote()
        await self.settle()
        if credentials.record.cause != cause:
            raise RotationError("the server has refused the new certificate; the old one stays")

    async def settle(self) -> None:
        """Tell the server that the certificate in use works, and then let the one before it go.

        Raises EnrolmentAwayError when there is no clear answer: both stay.
        """
        credentials = self._credentials
        if credentials.record.confirmed or credentials.record.current is None:
            return
        try:
            await self._server.confirm(self._current())
        except EnrolmentRefusedError as error:
            if error.status not in _NOT_YOURS:
                raise EnrolmentAwayError(f"no clear answer about the new certificate: {error}") from error
            credentials.revert()
            return
        credentials.confirmed()

    def _current(self) -> Pair:
        assert self._credentials.record.current is not None
        return self._credentials.pair(self._credentials.record.current)

    def _next(self) -> Pair:
        assert self._credentials.record.next is not None
        return self._credentials.pair(self._credentials.record.next)
