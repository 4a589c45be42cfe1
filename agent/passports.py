"""Which of its certificates a device connects with, when it has several: during a rotation, and when one fails."""

import asyncio

from agent.credentials import Credentials, Pair
from agent.trust import Trust


class Passports:
    """Which certificate the next connection is tried with, how it fared, and whom the device believes at the other end."""

    def __init__(self, credentials: Credentials, trust: Trust) -> None:
        self.trust = trust
        self._credentials = credentials
        self._failures = 0
        self._tried: Pair | None = None
        self._asked: tuple[int, asyncio.Future[bool]] | None = None

    def choose(self) -> Pair:
        """The pair for the next connection: the best one first, then the others in turn."""
        candidates = self._credentials.candidates()
        self._tried = candidates[self._failures % len(candidates)]
        return self._tried

    def worked(self) -> None:
        """The connection stands."""
        self._failures = 0
        self._tell(True)

    def failed(self) -> None:
        """It could not be made, or was lost."""
        self._failures += 1
        self._tell(False)

    def fare(self, number: int) -> "asyncio.Future[bool]":
        """How the next connection with this pair goes; the next one is tried with the best pair."""
        self._failures = 0
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._asked = (number, future)
        return future

    def stands_with(self, number: int) -> bool:
        """Whether the connection was last tried with this pair and nothing has failed since."""
        return self._failures == 0 and self._tried is not None and self._tried.number == number

    def _tell(self, worked: bool) -> None:
        if self._asked is not None and self._tried is not None and self._tried.number == self._asked[0]:
            if not self._asked[1].done():
                self._asked[1].set_result(worked)
            self._asked = None
