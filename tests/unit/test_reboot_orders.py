"""Row 47: nobody reboots a device by guessing, repeating, redirecting or waiting. Each defence has its mutant."""

import random
import secrets
import statistics
import time
from dataclasses import replace
from typing import Any

import orjson
import pytest

import agent.reboot
import firmware.reboot
from agent.reboot import LOCK_SECONDS, MAX_USED, MAX_WRONG, RebootGuard
from firmware.command import COMMAND_PAYLOAD_TYPE, Command, encode_command
from firmware.envelope import EnvelopeSigner, sign_envelope
from firmware.errors import (
    EnvelopeError,
    ExpiredError,
    FirmwareError,
    MisdirectedError,
    ReplayError,
    SignatureError,
    StatementError,
)
from firmware.keys import TrustedKeys, generate_private_key
from firmware.reboot import (
    MAX_LIFETIME_SECONDS,
    REBOOT_PAYLOAD_TYPE,
    RebootOrder,
    decode_reboot,
    encode_reboot,
    reboot_token,
    verify_reboot,
)
from tests.agent_flash import Flash, PowerCut

KEY, STRANGER = generate_private_key(), generate_private_key()
KEYS = TrustedKeys.of([generate_private_key().public_key()], [KEY.public_key()])
SIGNER = EnvelopeSigner(KEY, REBOOT_PAYLOAD_TYPE)
NOW = 1_800_000_000
REQUEST = "a" * 32


def order(**changes: Any) -> RebootOrder:
    made = RebootOrder("motor-7", REQUEST, "reboot", 10, NOW, NOW + 60, secrets.token_hex(16))
    return replace(made, **changes)


def token(**changes: Any) -> str:
    return reboot_token(order(**changes), SIGNER)


def verify(text: object, **given: Any) -> None:
    facts: dict[str, Any] = {
        "device_id": "motor-7",
        "used": set(),
        "now": NOW,
        "request_id": REQUEST,
        "delay_seconds": 10,
    }
    verify_reboot(text, KEYS, **{**facts, **given})


class Clock:
    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


class Bench:
    """A device's guard on storage that survives it."""

    def __init__(self, device_id: str = "motor-7") -> None:
        self.flash, self.clock, self.device_id = Flash(), Clock(), device_id
        self.busy: str | None = None
        self.start()

    def start(self) -> None:
        """As after a power cut."""
        self.guard = RebootGuard(self.flash, KEYS, self.device_id, self.clock, lambda: self.busy)

    def answer(self, text: object, request_id: str = REQUEST, delay: int = 10) -> dict[str, Any]:
        return self.guard.answer(request_id, {"confirmationToken": text, "delaySeconds": delay})


# --- the statement ---------------------------------------------------------------------------------------------------


def test_an_order_that_holds_is_taken() -> None:
    verify(token())


@pytest.mark.parametrize(
    ("made", "given", "error"),
    [
        ({}, {"device_id": "motor-8"}, MisdirectedError),
        ({}, {"request_id": "b" * 32}, MisdirectedError),
        ({}, {"delay_seconds": 0}, MisdirectedError),
        ({}, {"now": NOW + 60}, ExpiredError),
        ({}, {"latest_known_time": NOW + 60, "now": 0}, ExpiredError),
        ({}, {"used": {REQUEST}}, ReplayError),
        ({"nonce": "c" * 32}, {"used": {"c" * 32}}, ReplayError),
    ],
)
def test_an_order_that_is_not_for_here_and_now_is_refused(
    made: dict[str, Any], given: dict[str, Any], error: type[FirmwareError]
) -> None:
    with pytest.raises(error):
        verify(token(**made), **given)


@pytest.mark.parametrize(
    "text", [None, 5, "", "[]", "null", "{}", "x" * 5000, '{"payload":"","payload":""}', "\ud800", b"bytes", {"a": 1}]
)
def test_what_is_no_order_is_refused_as_such(text: object) -> None:
    with pytest.raises(FirmwareError):
        verify(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"expires_at": NOW + MAX_LIFETIME_SECONDS + 1},
        {"expires_at": NOW},
        {"nonce": "a" * 31},
        {"nonce": "A" * 32},
        {"operation": "wipe-credentials"},
        {"delay_seconds": 3601},
        {"delay_seconds": -1},
        {"delay_seconds": True},
        {"device_id": "a/b"},
        {"request_id": "a" * 31},
    ],
)
def test_nobody_signs_an_order_that_lasts_long_or_has_a_short_nonce_and_no_device_would_read_it(
    changes: dict[str, Any],
) -> None:
    with pytest.raises(StatementError):
        encode_reboot(order(**changes))
    fields = {**orjson.loads(encode_reboot(order())), **changes}
    with pytest.raises(StatementError):
        decode_reboot(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS))


def test_no_other_statement_and_no_other_key_is_an_order_to_reboot() -> None:
    command = Command("motor-7", REQUEST, "rotate-certificate", NOW, NOW + 60, "b" * 32)
    as_command = sign_envelope(encode_command(command), COMMAND_PAYLOAD_TYPE, KEY)
    with pytest.raises(EnvelopeError):
        verify(orjson.dumps(as_command).decode())
    as_reboot = sign_envelope(encode_command(command), REBOOT_PAYLOAD_TYPE, KEY)
    with pytest.raises(StatementError):
        verify(orjson.dumps(as_reboot).decode())
    with pytest.raises(SignatureError):
        verify(reboot_token(order(), EnvelopeSigner(STRANGER, REBOOT_PAYLOAD_TYPE)))


# --- the device ------------------------------------------------------------------------------------------------------


def test_an_order_reboots_once_however_often_it_comes() -> None:
    bench, text = Bench(), token()
    assert bench.answer(text) == {"scheduled": True, "delaySeconds": 10}
    assert bench.guard.due_in == 10
    bench.start()
    assert bench.answer(text) == {"scheduled": True}, "asked again, it says the same"
    assert bench.guard.due_in is None, "and does not reboot again"


@pytest.mark.parametrize("defended", [True, False])
def test_an_order_is_used_up_on_the_device_whatever_request_it_is_sent_under(
    defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, text = Bench(), token(nonce="d" * 32)
    bench.answer(text)
    bench.start()
    if not defended:  # a device that forgets what it has used
        monkeypatch.setattr(agent.reboot.RebootGuard, "_load", lambda self: agent.reboot.RebootState())
        bench.start()
    bench.answer(text)
    assert (bench.guard.due_in is None) is defended


@pytest.mark.parametrize("defended", [True, False])
def test_an_order_for_another_device_is_refused(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("motor-8")
    if not defended:
        really = firmware.reboot.verify_reboot

        def careless(text: object, keys: TrustedKeys, device_id: str, *more: Any, **named: Any) -> Any:
            return really(text, keys, "motor-7", *more, **named)

        monkeypatch.setattr(agent.reboot, "verify_reboot", careless)
    answer = bench.answer(token())
    assert (bench.guard.due_in is None) is defended
    assert ("error" in answer) is defended


@pytest.mark.parametrize("defended", [True, False])
def test_ten_thousand_guesses_are_five_and_a_lock(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = 0
    really = firmware.reboot.verify_reboot

    def counting(*arguments: Any, **named: Any) -> Any:
        nonlocal looked_at
        looked_at += 1
        return really(*arguments, **named)

    monkeypatch.setattr(agent.reboot, "verify_reboot", counting)
    if not defended:
        monkeypatch.setattr(agent.reboot, "MAX_WRONG", 10**9)
    bench, rng = Bench(), random.Random(47)
    genuine = orjson.loads(token())
    guesses = 10_000 if defended else 200
    for number in range(guesses):
        genuine["signatures"][0]["sig"] = (
            orjson.loads(token())["signatures"][0]["sig"][:-4] + rng.choice("ABCD") * 2 + "=="
        )
        answer = bench.answer(orjson.dumps(genuine).decode(), request_id=f"{number:032x}")
        assert "error" in answer
        if number == 4000:
            bench.start()  # a power cut does not end the lock
    assert looked_at == (MAX_WRONG if defended else guesses)
    assert bench.guard.due_in is None
    if defended:
        assert "locked after 5 wrong orders, for 15 minutes more" in bench.answer(token())["error"]
        assert len([each for each in bench.flash.operations if each.startswith("rename")]) == MAX_WRONG
        bench.clock.now += LOCK_SECONDS
        late = token(issued_at=NOW + LOCK_SECONDS, expires_at=NOW + LOCK_SECONDS + 60)
        assert bench.answer(late)["scheduled"] is True


def test_a_lock_ends_after_its_time_even_where_the_clock_is_set_back_and_counts_anew() -> None:
    bench = Bench()
    for _ in range(MAX_WRONG):
        answer = bench.answer("{}")
    assert answer["error"].endswith("locked for 15 minutes") and answer["wrongTokens"] == 5
    bench.clock.now -= 10**6
    assert "for 15 minutes more" in bench.answer(token())["error"]
    bench.clock.now = NOW + LOCK_SECONDS
    for number in range(1, MAX_WRONG + 1):
        assert bench.answer("{}")["wrongTokens"] == number


@pytest.mark.parametrize("defended", [True, False])
def test_a_lock_ends_on_a_device_whose_clock_has_lost_its_time(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    for _ in range(MAX_WRONG):
        bench.answer("{}")
    if not defended:  # as it was: no longer than a lock is, whenever one looks
        monkeypatch.setattr(
            agent.reboot.RebootGuard,
            "_locked_for",
            lambda self, now: min(self.state.locked_until - now, LOCK_SECONDS),
        )
    bench.clock.now = 60  # a power cut, and no battery
    bench.start()
    assert "for 15 minutes more" in bench.answer("{}")["error"]
    bench.clock.now += LOCK_SECONDS - 1
    bench.start()
    assert "locked after" in bench.answer("{}")["error"]
    bench.clock.now += 1
    assert (bench.answer("{}").get("wrongTokens") == 1) is defended


def test_a_good_order_ends_the_count() -> None:
    bench = Bench()
    for _ in range(MAX_WRONG - 1):
        bench.answer("{}")
    assert bench.answer(token())["scheduled"] is True
    assert bench.guard.state.wrong == 0


def test_how_long_a_refusal_takes_says_nothing_of_how_near_a_guess_was() -> None:
    """The device has no secret to compare with; a signature that is right but for its end is refused in the same time."""
    envelope = orjson.loads(token())
    right = envelope["signatures"][0]["sig"]
    noise = orjson.loads(token())["signatures"][0]["sig"]
    near, far = right[:80] + noise[80:], noise
    took: dict[str, list[float]] = {near: [], far: []}
    for _ in range(200):
        for sig in (near, far):
            envelope["signatures"][0]["sig"] = sig
            text = orjson.dumps(envelope).decode()
            started = time.perf_counter()
            with pytest.raises(FirmwareError):
                verify(text)
            took[sig].append(time.perf_counter() - started)
    quick = {sig: statistics.quantiles(times, n=10)[0] for sig, times in took.items()}
    assert 1 / 3 < quick[near] / quick[far] < 3  # a comparison byte by byte would differ by far more over its length


@pytest.mark.parametrize("defended", [True, False])
def test_a_power_cut_at_any_moment_makes_no_order_good_for_two_reboots(
    defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not defended:  # a device that remembers in memory alone
        monkeypatch.setattr(agent.reboot, "replace_durably", lambda storage, name, data: storage.write(name, data))
    text, most, cuts = token(), 0, 0
    for cut in ("none", "some", "all"):
        for at in (1, 2, 3, 4, None):
            bench, reboots = Bench(), 0
            bench.flash.cut, bench.flash.cut_at = cut, at
            try:
                bench.answer(text)
                reboots += bench.guard.due_in is not None
                bench.flash.cut_at, bench.flash.cut = len(bench.flash.operations) + 1, "none"
                bench.flash.write("anything", b"")  # the power goes before the reboot
            except PowerCut:
                cuts += 1
            bench.start()
            bench.answer(text)
            reboots += bench.guard.due_in is not None
            most = max(most, reboots)
    assert cuts == 15
    assert most == (1 if defended else 2)


def test_a_device_whose_new_image_is_on_trial_does_not_reboot() -> None:
    bench = Bench()
    bench.busy = "a new image is on trial"
    assert bench.answer(token()) == {"error": "cannot reboot now: a new image is on trial"}
    assert bench.guard.due_in is None and bench.guard.state.wrong == 0


def test_what_is_remembered_is_bounded() -> None:
    bench = Bench()
    for number in range(3 * MAX_USED):
        name = f"{number:032x}"
        assert bench.answer(token(request_id=name), request_id=name)["scheduled"] is True
    assert len(bench.guard.state.used) == 2 * MAX_USED
