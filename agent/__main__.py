"""`python -m agent`: one device as a process. A reboot is a new start of the same program through the boot loader.

With `--enrolment-url` the device gets a key and a certificate of its own before anything else, and is known by the name
in that certificate. Exit status: 0 after SIGTERM or SIGINT, 2 for a wrong command line, 3 when no slot can be booted, 4
when its credentials have been wiped: started again, it stays so (`--enrol-again` is a person's word). A crash of the running
image, a hang (found by the watchdog, an interval timer that the event loop keeps winding up) and a reboot replace the
process by itself (`os.execv`), so its process id stays.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx

from agent.bootloader import Boot, BootLoader
from agent.client import Broker, Patience
from agent.commands import Enrolled
from agent.credentials import Credentials, Standing
from agent.custom import Program
from agent.device import Device, DeviceConfig, Reset, Timing
from agent.download import DownloadPolicy
from agent.enrolment import Claim, EnrolmentPatience, EnrolmentServer, enrol_for_good
from agent.errors import BrickedError
from agent.slots import Slots
from agent.storage import PosixStorage
from agent.trust import Trust
from agent.updater import Identity
from agent.vitals import measured
from firmware.keys import TrustedKeys, load_public_key
from models.errors import TidegateError
from models.ids import THING_NAME

BRICKED = 3
WIPED = 4
USAGE = 2


def main() -> None:
    """Boot the device and run it until it resets; then start again."""
    arguments = _parser().parse_args()
    try:
        reset = _boot_once(arguments)
    except BrickedError as error:
        print(f"agent: {error}", file=sys.stderr)
        sys.exit(BRICKED)
    except TidegateError as error:
        print(f"agent: {error}", file=sys.stderr)
        sys.exit(USAGE)
    if reset is Reset.WIPED:
        print("agent: the credentials are wiped; this device connects no more", file=sys.stderr, flush=True)
        sys.exit(WIPED)
    if reset is not Reset.STOPPED:
        print(f"agent: reset ({reset})", file=sys.stderr, flush=True)
        _start_again()


def _boot_once(arguments: argparse.Namespace) -> Reset:
    arguments.state.mkdir(parents=True, exist_ok=True)
    storage = PosixStorage(arguments.state)
    slots = Slots(storage)
    if not slots.made():
        if arguments.base is None:
            raise TidegateError(
                f"cannot start: {arguments.state} holds no device yet; give its first image with --base"
            )
        slots.make(arguments.base.read_bytes(), arguments.base_version)
    enrolled = _enrolled(arguments, storage)
    if enrolled is not None and enrolled.credentials.record.standing is Standing.WIPED:
        return Reset.WIPED
    if enrolled is None and arguments.id is None:
        raise TidegateError("cannot start: a device that does not enrol needs a name; give --id, or --enrolment-url")
    return asyncio.run(_run(arguments, storage, BootLoader(slots).boot(), enrolled))


async def _run(arguments: argparse.Namespace, storage: PosixStorage, boot: Boot, enrolled: Enrolled | None) -> Reset:
    trial = ", on trial" if boot.trial else ""
    print(f"agent: slot {boot.slot} runs {boot.version} ({boot.sha256[:16]}){trial}", file=sys.stderr, flush=True)
    loop = asyncio.get_running_loop()
    watchdog = loop.create_task(_wind_up(arguments.watchdog))

    async def live() -> Reset:
        thing = arguments.id
        if enrolled is not None:
            thing = await _enrol(arguments, enrolled)
        config = _config(arguments, thing)
        async with httpx.AsyncClient(timeout=config.download.window_seconds) as http:
            device = Device(config, storage, http=http, hang=_hang, enrolled=enrolled, custom=_custom(arguments))
            return await device.run_boot(boot)

    life = loop.create_task(live())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, life.cancel)
    try:
        return await life
    except asyncio.CancelledError:
        return Reset.STOPPED
    finally:
        watchdog.cancel()
        signal.setitimer(signal.ITIMER_REAL, 0)


def _custom(arguments: argparse.Namespace) -> Program | None:
    """What does custom tasks of fleet jobs; None: they are rejected."""
    if arguments.custom_command is None:
        return None
    return Program(arguments.custom_command.absolute(), arguments.custom_within)


def _enrolled(arguments: argparse.Namespace, storage: PosixStorage) -> Enrolled | None:
    """The device's credentials and who gives them; None for a device without."""
    if arguments.enrolment_url is None:
        return None
    if arguments.cert is not None:
        raise TidegateError("give --enrolment-url or --cert, not both: an enrolled device has its own certificate")
    patience = EnrolmentPatience(retry_seconds=arguments.retry, refused_seconds=arguments.refused)
    trust = Trust(arguments.ca, storage)
    server = EnrolmentServer(arguments.enrolment_url, trust, patience)
    credentials = Credentials(storage)
    if arguments.enrol_again:
        credentials.forgive_wipe()
    return Enrolled(credentials, server, arguments.serial or arguments.id or "", trust)


async def _enrol(arguments: argparse.Namespace, enrolled: Enrolled) -> str:
    """The device's thing name; asks for its first certificate until there is one."""
    if enrolled.credentials.record.current is not None:
        return enrolled.credentials.thing_name
    if arguments.claim_cert is None or arguments.claim_key is None or not enrolled.serial_number:
        raise TidegateError("cannot enrol: give --claim-cert, --claim-key and --serial")
    claim = Claim(arguments.claim_cert, arguments.claim_key)
    thing = await enrol_for_good(enrolled.credentials, enrolled.server, claim, enrolled.serial_number)
    print(f"agent: enrolled as {thing}", file=sys.stderr, flush=True)
    return thing


async def _wind_up(seconds: float) -> None:
    """The watchdog: fires `seconds` after the event loop has stopped turning."""
    signal.signal(signal.SIGALRM, _bite)
    while True:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        await asyncio.sleep(seconds / 4)


def _bite(number: int, frame: FrameType | None) -> None:
    print("agent: reset (watchdog)", file=sys.stderr, flush=True)
    _start_again()


async def _hang(seconds: float) -> None:
    """An image that hangs: nothing turns any more, until the watchdog bites."""
    while True:
        time.sleep(1)  # noqa: ASYNC251


def _start_again() -> NoReturn:
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.execv(sys.executable, [sys.executable, "-m", "agent", *sys.argv[1:]])


def _config(arguments: argparse.Namespace, thing: str) -> DeviceConfig:
    if not THING_NAME.fullmatch(thing):
        raise TidegateError(f"not a device id: {thing!r}, expected {THING_NAME.pattern}")
    keys = TrustedKeys.of(
        release=[load_public_key(path) for path in arguments.release_key],
        order=[load_public_key(path) for path in arguments.order_key],
    )
    broker = Broker.at(
        arguments.mqtt,
        ca=arguments.ca,
        certificate=arguments.cert,
        private_key=arguments.cert_key,
        protocol=5 if arguments.mqtt_version == "5" else 4,
    )
    return DeviceConfig(
        identity=Identity(thing, arguments.type, keys, arguments.product),
        broker=broker,
        timing=Timing(
            poll_seconds=arguments.poll,
            retry_seconds=arguments.retry,
            heartbeat_seconds=arguments.heartbeat,
            confirm_seconds=arguments.confirm_within,
            watchdog_seconds=arguments.watchdog,
        ),
        patience=Patience(answer_seconds=arguments.answer_within),
        download=DownloadPolicy(window_seconds=arguments.download_window),
        vitals=measured,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m agent",
        description="Tidegate's reference device: asks the gateway for firmware updates over MQTT, downloads, verifies and "
        "installs them into the inactive one of two slots, and keeps an update only after it has reached the gateway "
        "from the new image.",
        epilog="example: python -m agent --id motor-7 --type motor --mqtt mqtt://127.0.0.1:1883 --state motor-7 "
        "--base motor-1.2.0.bin --base-version 1.2.0 --release-key release.pub.pem --order-key order.pub.pem",
    )
    who = parser.add_argument_group("the device")
    who.add_argument("--id", help="thing name, as in the registry; an enrolled device has it from its certificate")
    who.add_argument("--type", required=True, help="hardware, which a release must be for")
    who.add_argument("--product", help="product it is; without it, the product of the first release that is confirmed")
    who.add_argument("--state", required=True, type=Path, metavar="DIR", help="its flash: slots, records, downloads")
    who.add_argument("--base", type=Path, metavar="IMAGE", help="first image, used when DIR holds no device yet")
    who.add_argument("--base-version", default="0.0.0", metavar="VERSION", help="version of --base (0.0.0)")
    who.add_argument(
        "--custom-command",
        type=Path,
        metavar="PROGRAM",
        help="does what custom jobs say, with the signed document on standard input; exit status 0 is success. Started "
        "directly, never through a shell. Without it custom jobs are rejected",
    )
    trust = parser.add_argument_group("whom it trusts (repeat for more than one)")
    for role, what in (("release", "what may run"), ("order", "which device, which job, until when")):
        trust.add_argument(
            f"--{role}-key", required=True, type=Path, action="append", metavar="PEM", help=f"public key: {what}"
        )
    where = parser.add_argument_group("the broker")
    where.add_argument("--mqtt", default="mqtt://127.0.0.1:1883", metavar="URL", help="mqtt:// or mqtts://host:port")
    where.add_argument("--mqtt-version", choices=("3.1.1", "5"), default="3.1.1", help="MQTT version (3.1.1)")
    where.add_argument("--ca", type=Path, metavar="PEM", help="CA of an mqtts broker and of the enrolment server")
    where.add_argument("--cert", type=Path, metavar="PEM", help="the device's certificate")
    where.add_argument("--cert-key", type=Path, metavar="PEM", help="key of that certificate")
    enrolment = parser.add_argument_group("enrolment (a certificate of its own, instead of --cert)")
    enrolment.add_argument("--enrolment-url", metavar="URL", help="https://host:port, checked against --ca")
    enrolment.add_argument("--claim-cert", type=Path, metavar="PEM", help="claim certificate of its batch")
    enrolment.add_argument("--claim-key", type=Path, metavar="PEM", help="key of that certificate")
    enrolment.add_argument("--serial", metavar="SERIAL", help="its serial number (--id)")
    enrolment.add_argument(
        "--enrol-again", action="store_true", help="also where its credentials were wiped by command"
    )
    pace = parser.add_argument_group("its rhythm, in seconds")
    for name, default, what in (
        ("poll", 900.0, "asks without a hint this often, at most"),
        ("retry", 2.0, "asks again after an empty answer, doubled each time up to --poll"),
        ("heartbeat", 60.0, "between heartbeats; 0 for none"),
        ("answer-within", 10.0, "waits so long for an answer"),
        ("confirm-within", 300.0, "for each try of a new image to reach the gateway"),
        ("refused", 900.0, "asks again after its enrolment was refused"),
        ("custom-within", 300.0, "for --custom-command, which is killed after that"),
        ("watchdog", 30.0, "until a hanging image is reset"),
        ("download-window", 60.0, "over which a download must keep its least average rate"),
    ):
        pace.add_argument(f"--{name}", type=float, default=default, metavar="S", help=f"{what} ({default:g})")
    return parser


if __name__ == "__main__":
    main()
