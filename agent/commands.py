"""Commands about the device's identity: rotate the certificate, wipe the credentials. Only what the order key has signed.

A command is asked for with every connection and every hint, and the gateway gives the open one until it is answered; so
a device that lost its power in the middle is told again, and goes on. What has ended is kept with its answer: the same
command again is answered, and never carried out twice.

Between commands the same loop keeps the identity in order: a rotation that was cut is finished, a certificate near its
end is renewed, the CAs to believe are asked for.

The answer to a wipe goes out before the credentials go, for it needs them. The decision to wipe is durable before that.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from agent.client import JobsClient
from agent.credentials import Credentials, Pair, Standing, renewal_is_due
from agent.enrolment import Enroller
from agent.errors import CredentialError, EnrolmentError, RecordError, RequestError, RotationError
from agent.passports import Passports
from agent.records import decode_record, encode_record
from agent.rotation import Rotation
from agent.storage import Storage, replace_durably
from agent.trust import Trust
from firmware.command import VerifiedCommand, verify_command
from firmware.errors import FirmwareError
from firmware.keys import TrustedKeys
from models.protocol import CommandStatus, Operation, command_topic

RECORD_NAME = "commands.json"
RECORD_KIND = "commands"
MAX_ENDED = 50
"""Ended commands that are remembered; beyond it the ones that expire first are dropped, and expiry refuses them."""
MAX_REASON_CHARS = 300
PROOFS = 3
"""Connections tried with a new certificate before it is given up."""

ANSWERS = 3
"""Tries to say that the credentials will be wiped, before they are."""

RENEW_AGAIN_SECONDS = 3600.0
LEARN_SECONDS = 86_400.0
"""How often the device asks whom else to believe; a CA is announced long before it is used."""


@dataclass(frozen=True, slots=True)
class EndedCommand:
    """What was answered, and until when the order was valid."""

    status: str
    reason: str
    expires_at: int


@dataclass(frozen=True, slots=True)
class CommandState:
    """What the device remembers of commands, by request id."""

    ended: Mapping[str, EndedCommand] = field(default_factory=dict)
    latest_known_time: int = 0

    def with_ended(self, request_id: str, ended: EndedCommand, latest: int) -> "CommandState":
        """The state once a command has ended."""
        kept = {name: entry for name, entry in self.ended.items() if entry.expires_at > latest} | {request_id: ended}
        if len(kept) > MAX_ENDED:
            kept = dict(sorted(kept.items(), key=lambda item: item[1].expires_at)[-MAX_ENDED:])
        return CommandState(kept, latest)


class CommandStore:
    """That state on the device's storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.state = self._load()

    def put(self, state: CommandState) -> None:
        """Keep it durably. Raises OSError."""
        replace_durably(self._storage, RECORD_NAME, encode_record(RECORD_KIND, asdict(state)))
        self.state = state

    def _load(self) -> CommandState:
        data = self._storage.read(RECORD_NAME)
        if data is None:
            return CommandState()
        try:
            fields: dict[str, Any] = decode_record(data, RECORD_KIND)
        except RecordError:
            return CommandState()
        ended = {name: EndedCommand(**entry) for name, entry in fields["ended"].items()}
        return CommandState(ended, fields["latest_known_time"])


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How often the gateway is asked for commands, in seconds."""

    poll_seconds: float
    retry_seconds: float


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A device with credentials of its own: where they are, who gives it others, and whom it believes."""

    credentials: Credentials
    server: Enroller
    serial_number: str
    trust: Trust


class Commander:
    """Carries out commands. `run` returns when the device is to be wiped: the caller ends the session, then wipes."""

    def __init__(
        self,
        client: JobsClient,
        storage: Storage,
        keys: TrustedKeys,
        enrolled: Enrolled,
        passports: Passports,
        rhythm: Rhythm,
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._store = CommandStore(storage)
        self._keys = keys
        self._credentials = enrolled.credentials
        self._passports = passports
        self._server, self._trust = enrolled.server, enrolled.trust
        self._learned_at: float | None = None
        self._renew_from = 0.0
        self._rotation = Rotation(enrolled.credentials, enrolled.server, enrolled.serial_number, self._prove)
        self._rhythm = rhythm
        self._clock = clock

    async def run(self) -> None:
        """Until the credentials are to be wiped."""
        failures = 0
        while True:
            await self._client.connected.wait()
            self._client.command_hint.clear()
            try:
                settled = await self._go_on()
                found = await self._once()
                if self._credentials.record.standing is Standing.WIPING:
                    return
                failures = 0 if settled else failures + 1
                seconds = self._rhythm.retry_seconds if found else self._pause(failures)
            except (RequestError, EnrolmentError, CredentialError, OSError) as error:
                self._client.log.say(self._client.thing, str(error))
                failures += 1
                seconds = self._pause(failures)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds * self._client.rng.uniform(0.5, 1.5)):
                    await self._client.command_hint.wait()

    def _pause(self, failures: int) -> float:
        if not failures:
            return self._rhythm.poll_seconds
        return min(self._rhythm.poll_seconds, self._rhythm.retry_seconds * 2.0 ** min(failures, 20))

    async def _go_on(self) -> bool:
        """What a rotation still lacks that was cut, whether or not its command comes again. False: it still lacks it.

        Commands are asked for all the same: a device must hear of a wipe while the enrolment server is away.
        """
        record = self._credentials.record
        try:
            if record.next is not None:
                await self._rotation.rotate(record.next_cause)
            else:
                await self._rotation.settle()
            await self._learn()
            await self._renew()
        except RotationError as error:
            self._client.log.say(self._client.thing, str(error))
        except (EnrolmentError, CredentialError) as error:
            self._client.log.say(self._client.thing, str(error))
            return False
        return True

    async def _renew(self) -> None:
        """Come for the next certificate by itself, where nobody has asked for it in time; at most once in an hour."""
        now, certificate = asyncio.get_running_loop().time(), self._credentials.certificate
        if certificate is None or now < self._renew_from or not renewal_is_due(certificate, self._clock()):
            return
        self._renew_from = now + RENEW_AGAIN_SECONDS
        await self._rotation.rotate(f"renewal of {self._credentials.record.current}")

    async def _learn(self) -> None:
        """With every start and once a day: the CAs that the enrolment server vouches for."""
        now = asyncio.get_running_loop().time()
        if self._learned_at is None or now - self._learned_at >= LEARN_SECONDS:
            self._trust.learn(await self._server.authorities())
            self._learned_at = now

    async def _once(self) -> bool:
        """Ask, and carry out what comes. Whether there was anything. Raises RequestError, EnrolmentError, OSError."""
        while not self._client.commands.empty():
            self._client.commands.get_nowait()
        await self._client.publish(command_topic(self._client.thing, "get"), {})
        try:
            async with asyncio.timeout(self._client.patience.answer_seconds):
                body = await self._client.commands.get()
        except TimeoutError:
            return False  # a gateway that knows no commands says nothing
        request_id, order = body.get("requestId"), body.get("order")
        if not isinstance(request_id, str) or not isinstance(order, Mapping):
            return False
        await self._carry_out(request_id[:64], order)
        return True

    async def _carry_out(self, request_id: str, order: Mapping[str, Any]) -> None:
        state = self._store.state
        if request_id in state.ended:
            ended = state.ended[request_id]
            return await self._answer(request_id, CommandStatus(ended.status), ended.reason)
        try:
            verified = verify_command(
                order,
                self._keys,
                self._client.thing,
                state.ended.keys(),
                int(self._clock()),
                request_id=request_id,
                latest_known_time=state.latest_known_time,
            )
        except FirmwareError as error:
            return await self._answer(request_id, CommandStatus.FAILED, str(error))
        self._store.put(replace(state, latest_known_time=verified.latest_known_time))
        if verified.operation is Operation.WIPE_CREDENTIALS:
            return await self._wipe(verified)
        return await self._rotate(verified)

    async def _rotate(self, verified: VerifiedCommand) -> None:
        request_id = verified.command.request_id
        await self._answer(request_id, CommandStatus.ACCEPTED, "")
        status, reason = CommandStatus.SUCCEEDED, ""
        try:
            await self._rotation.rotate(request_id)
        except RotationError as error:
            status, reason = CommandStatus.FAILED, str(error)
        await self._end(verified, status, reason)

    async def _wipe(self, verified: VerifiedCommand) -> None:
        """The decision first, durably; then the word, for as long as somebody may take it; the wipe is the caller's."""
        self._credentials.begin_wipe()
        for _ in range(ANSWERS):
            with contextlib.suppress(RequestError):
                await self._end(verified, CommandStatus.SUCCEEDED, "")
                return

    async def _end(self, verified: VerifiedCommand, status: CommandStatus, reason: str) -> None:
        ended = EndedCommand(status, reason[:MAX_REASON_CHARS], verified.command.expires_at)
        self._store.put(self._store.state.with_ended(verified.command.request_id, ended, verified.latest_known_time))
        await self._answer(verified.command.request_id, status, reason)

    async def _answer(self, request_id: str, status: CommandStatus, reason: str) -> None:
        body = {"requestId": request_id, "status": status} | ({"reason": reason[:MAX_REASON_CHARS]} if reason else {})
        await self._client.publish(command_topic(self._client.thing, "response"), body)

    async def _prove(self, pair: Pair) -> bool:
        """Connect to the broker with this pair, and see it stand."""
        if self._client.connected.is_set() and self._passports.stands_with(pair.number):
            return True
        for _ in range(PROOFS):
            fare = self._passports.fare(pair.number)
            self._client.drop()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._client.patience.proof_seconds):
                    if await fare:
                        return True
        return False
