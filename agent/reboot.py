"""Whether the device reboots because somebody far away says so: only by a signed order, once, and not for guessers.

What has been used is durable before the answer goes out, so no power cut makes an order good for a second reboot. After
`MAX_WRONG` orders that did not hold, the device looks at no other one for `LOCK_SECONDS`; what it is asked meanwhile costs
neither a verification nor a write to its flash.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from agent.errors import RecordError
from agent.records import decode_record, encode_record
from agent.storage import Storage, replace_durably
from firmware.errors import FirmwareError
from firmware.keys import TrustedKeys
from firmware.reboot import MAX_DELAY_SECONDS, VerifiedReboot, verify_reboot

RECORD_NAME = "reboots.json"
RECORD_KIND = "reboots"
MAX_WRONG = 5
LOCK_SECONDS = 900
DEFAULT_DELAY_SECONDS = 10
MAX_USED = 50
"""Used orders that are remembered; beyond it the ones that expire first are dropped, and expiry refuses them."""
MAX_REASON_CHARS = 300


@dataclass(frozen=True, slots=True)
class RebootState:
    """What the device remembers. `used`: request ids and nonces, and until when their order was valid."""

    used: Mapping[str, int] = field(default_factory=dict)
    wrong: int = 0
    locked_until: int = 0
    latest_known_time: int = 0

    def with_used(self, verified: VerifiedReboot) -> "RebootState":
        """The state once an order has been taken."""
        latest, order = verified.latest_known_time, verified.order
        kept = {name: until for name, until in self.used.items() if until > latest}
        kept |= {order.request_id: order.expires_at, order.nonce: order.expires_at}
        if len(kept) > 2 * MAX_USED:
            kept = dict(sorted(kept.items(), key=lambda item: item[1])[-2 * MAX_USED :])
        return RebootState(kept, 0, 0, latest)


class RebootGuard:
    """Takes orders to reboot, or refuses them. `due_in` is the delay of the order it has taken, None before."""

    def __init__(
        self,
        storage: Storage,
        keys: TrustedKeys,
        device_id: str,
        clock: Callable[[], float],
        busy: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._storage = storage
        self._keys = keys
        self._device_id = device_id
        self._clock = clock
        self._busy = busy
        self.state = self._load()
        self.due_in: float | None = None

    def answer(self, request_id: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the answer to a `reboot` request."""
        now = int(self._clock())
        if request_id in self.state.used:
            return {"scheduled": True}  # asked again, because the answer was lost: one reboot all the same
        delay = parameters.get("delaySeconds", DEFAULT_DELAY_SECONDS)
        if isinstance(delay, bool) or not isinstance(delay, int) or not 0 <= delay <= MAX_DELAY_SECONDS:
            return {"error": f"delaySeconds: expected an integer from 0 to {MAX_DELAY_SECONDS}, got {delay!r:.40}"}
        if (left := self._locked_for(now)) > 0:
            return {"error": f"locked after {MAX_WRONG} wrong orders, for {math.ceil(left / 60)} minutes more"}
        try:
            verified = verify_reboot(
                parameters.get("confirmationToken"),
                self._keys,
                self._device_id,
                self.state.used.keys(),
                now,
                request_id=request_id,
                delay_seconds=delay,
                latest_known_time=self.state.latest_known_time,
            )
        except FirmwareError as error:
            return self._refuse(str(error), now)
        if (reason := self._busy()) is not None:
            return {"error": f"cannot reboot now: {reason}"}
        try:
            self._put(self.state.with_used(verified))
        except OSError as error:
            return {"error": f"cannot reboot: the order cannot be kept: {error}"[:MAX_REASON_CHARS]}
        self.due_in = float(delay)
        return {"scheduled": True, "delaySeconds": delay}

    def _locked_for(self, now: int) -> int:
        """Seconds. Where the clock was set back, the lock begins anew: by one that has lost its time it would never end."""
        if self.state.locked_until - now > LOCK_SECONDS:
            with contextlib.suppress(OSError):
                self._put(replace(self.state, locked_until=now + LOCK_SECONDS))
        return self.state.locked_until - now

    def _refuse(self, reason: str, now: int) -> dict[str, Any]:
        before = 0 if self.state.locked_until else self.state.wrong  # the lock that stood is over
        wrong = before + 1
        locked = wrong >= MAX_WRONG
        try:
            self._put(replace(self.state, wrong=wrong, locked_until=now + LOCK_SECONDS if locked else 0))
        except OSError as error:
            return {"error": f"refused, and cannot count it: {error}"[:MAX_REASON_CHARS]}
        said = f"Invalid confirmation token: {reason}"[:MAX_REASON_CHARS]
        return {"error": said + (f"; locked for {LOCK_SECONDS // 60} minutes" if locked else ""), "wrongTokens": wrong}

    def _put(self, state: RebootState) -> None:
        """In memory even where the storage refuses, for the count must not stand still."""
        self.state = state
        replace_durably(self._storage, RECORD_NAME, encode_record(RECORD_KIND, asdict(state)))

    def _load(self) -> RebootState:
        data = self._storage.read(RECORD_NAME)
        if data is None:
            return RebootState()
        try:
            return RebootState(**decode_record(data, RECORD_KIND))
        except RecordError:
            return RebootState()
