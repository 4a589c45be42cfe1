"""`python -m agent.fleet`: thousands of devices in one process, made of the agent's own code, and told to misbehave.

Two modes. Real: every device is agent.device with slots on disk, downloads, deltas and an aiomqtt session of its own;
a reboot tears it down and boots it again through the boot loader model. Simulate: agent.simulated, for benchmarks.

Faults come from a seed: the same (seed, device, version) meets the same fate in every run (agent/faults.py).

```python
config = FleetConfig(devices=devices, keys=keys, broker=Broker.at("mqtt://127.0.0.1:1883"), simulate=True)
report = await run_fleet(config, stop)
```
"""

import argparse
import asyncio
import contextlib
import hashlib
import resource
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import uvloop

from agent.client import Broker, Patience
from agent.custom import Program
from agent.device import Timing
from agent.enrolment import Claim, EnrolmentPatience, EnrolmentServer
from agent.faults import FaultPlan, FaultRule, share
from agent.fleet_config import DeviceReport, FleetConfig, FleetDevice, FleetEnrolment, FleetReport, read_devices
from agent.fleet_real import RealFleet
from agent.fleet_simulated import SimulatedFleet
from agent.trust import Trust
from firmware.keys import TrustedKeys, load_public_key
from models.errors import InvalidInputError, TidegateError
from models.ids import THING_NAME

__all__ = ["DeviceReport", "FleetConfig", "FleetDevice", "FleetReport", "read_devices", "run_fleet"]


async def run_fleet(config: FleetConfig, stop: asyncio.Event) -> FleetReport:
    """Run every device until `stop` is set; report what became of them.

    Raises:
        InvalidInputError: the configuration cannot be run.
        ConnectionError: simulate mode, and the broker cannot be reached at all.
    """
    _check(config)
    fleet: SimulatedFleet | RealFleet = SimulatedFleet(config) if config.simulate else RealFleet(config)
    marks = {"start": _cpu(), "ready": _cpu()}
    started = time.monotonic()

    def ready() -> None:
        nonlocal started
        marks["ready"], started = _cpu(), time.monotonic()
        if config.ready_file is not None:
            config.ready_file.write_text(f"{len(config.devices)} devices are connected\n")
        print(f"ready: {len(config.devices)} devices", file=sys.stderr, flush=True)

    await fleet.run(stop, ready)
    devices = fleet.report()
    report = FleetReport(
        devices=devices,
        outcomes=dict(Counter(str(status) or "ended" for device in devices for status in device.outcomes.values())),
        installs=sum(device.installs for device in devices),
        boots=sum(device.boots for device in devices),
        wall_seconds=time.monotonic() - started,
        cpu_seconds=_cpu() - marks["ready"],
        cpu_seconds_whole=_cpu() - marks["start"],
        peak_memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )
    if config.report_file is not None:
        config.report_file.write_bytes(report.to_json())
    return report


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _check(config: FleetConfig) -> None:
    if not config.simulate and (config.state_dir is None or config.base is None):
        raise InvalidInputError("cannot run the fleet: real devices need a state directory and a base image")
    if config.simulate and config.enrolment is not None:
        raise InvalidInputError(
            "cannot run the fleet: simulated devices have no certificates; leave --enrolment-url out"
        )
    if config.simulate and config.broker.tls:
        raise InvalidInputError("cannot run the fleet: simulated devices speak plain MQTT only; use an mqtt:// address")
    ids = [device.device_id for device in config.devices]
    if not ids or len(set(ids)) != len(ids):
        raise InvalidInputError(f"cannot run the fleet: {len(ids)} devices, {len(set(ids))} different ids")
    wrong = next((name for name in ids if not THING_NAME.fullmatch(name)), None)
    if wrong is not None:
        raise InvalidInputError(f"cannot run the fleet: {wrong!r} is no device id")


def main() -> None:
    """Run a fleet until SIGTERM, SIGINT or `--seconds`."""
    arguments = _parser().parse_args()
    try:
        config = _config(arguments)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report = runner.run(_run(config, arguments.seconds))
    except (TidegateError, OSError) as error:
        print(f"agent.fleet: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    print(
        f"{len(report.devices)} devices, {report.installs} installs, outcomes {report.outcomes or 'none'}, "
        f"{report.cpu_seconds:.1f} CPU s since ready ({report.cpu_seconds_whole:.1f} whole)"
    )


async def _run(config: FleetConfig, seconds: float | None) -> FleetReport:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if seconds is not None:
        loop.call_later(seconds, stop.set)
    return await run_fleet(config, stop)


def _config(arguments: argparse.Namespace) -> FleetConfig:
    if arguments.devices_file is not None:
        devices = read_devices(arguments.devices_file, arguments.devices)
    else:
        count = 10 if arguments.devices is None else arguments.devices
        names = [f"{arguments.prefix}{n}" for n in range(1, count + 1)]
        devices = tuple(FleetDevice(name, arguments.type, name) for name in names)
    faults = FaultPlan(
        arguments.seed,
        tuple(FaultRule.parse(text) for text in arguments.fault),
        share(arguments.slow),
        share(arguments.late),
    )
    base = arguments.base
    digest = hashlib.sha256(base.read_bytes()).hexdigest() if base else arguments.base_sha256
    return FleetConfig(
        devices=devices,
        keys=TrustedKeys.of(
            release=[load_public_key(path) for path in arguments.release_key],
            order=[load_public_key(path) for path in arguments.order_key],
        ),
        broker=Broker.at(arguments.mqtt, ca=arguments.ca),
        faults=faults,
        product=arguments.product,
        base_version=arguments.base_version,
        base=base,
        base_sha256=digest,
        state_dir=arguments.state,
        timing=Timing(
            poll_seconds=arguments.poll,
            retry_seconds=arguments.retry,
            heartbeat_seconds=arguments.heartbeat,
            confirm_seconds=arguments.confirm_within,
        ),
        patience=replace(Patience(), answer_seconds=arguments.answer_within),
        slow_bytes_per_second=arguments.slow_bytes_per_second,
        late_seconds=arguments.late_seconds,
        simulate=arguments.simulate,
        connections=arguments.connections,
        ask_on_connect=not arguments.no_ask,
        ready_file=arguments.ready_file,
        report_file=arguments.report,
        enrolment=_enrolment(arguments),
        custom=Program(arguments.custom_command.absolute()) if arguments.custom_command else None,
    )


def _enrolment(arguments: argparse.Namespace) -> FleetEnrolment | None:
    if arguments.enrolment_url is None:
        return None
    if arguments.claim_cert is None or arguments.claim_key is None:
        raise InvalidInputError("cannot enrol the fleet: give --claim-cert and --claim-key")
    patience = EnrolmentPatience(retry_seconds=arguments.retry, refused_seconds=arguments.refused)
    server = EnrolmentServer(arguments.enrolment_url, Trust(arguments.ca), patience, arguments.enrol_at_once)
    claim = Claim(arguments.claim_cert, arguments.claim_key)
    return FleetEnrolment(server, claim, arguments.enrolment_report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m agent.fleet",
        description="Runs a fleet of devices in one process: real ones (downloads, deltas, slots on disk), or simulated "
        "ones for benchmarks. Faults are derived from the seed, so a run can be repeated.",
        epilog="example: python -m agent.fleet --devices 60 --state fleet --base motor-1.2.0.bin --base-version 1.2.0 "
        "--release-key release.pub.pem --order-key order.pub.pem --fault version=1.3.0-rc1,crash=70%,no-confirm=30%",
    )
    who = parser.add_argument_group("the devices")
    who.add_argument("--devices", type=int, metavar="N", help="how many (10; or of the file, the first N)")
    who.add_argument("--devices-file", type=Path, metavar="JSONL", help="lines with device_id and device_type")
    who.add_argument("--prefix", default="device-", help="of their ids, without a file (device-)")
    who.add_argument("--type", default="motor", help="their hardware, without a file (motor)")
    who.add_argument("--product", help="product they are")
    who.add_argument("--state", type=Path, metavar="DIR", help="a folder for each real device")
    who.add_argument("--base", type=Path, metavar="IMAGE", help="their first image")
    who.add_argument("--base-version", default="0.0.0", metavar="VERSION", help="its version (0.0.0)")
    who.add_argument("--base-sha256", default="0" * 64, metavar="HEX", help="its hash, for --simulate without --base")
    who.add_argument(
        "--release-key", required=True, type=Path, action="append", metavar="PEM", help="public, repeatable"
    )
    who.add_argument("--order-key", required=True, type=Path, action="append", metavar="PEM", help="public, repeatable")
    who.add_argument(
        "--custom-command", type=Path, metavar="PROGRAM", help="does what custom jobs say, on real devices (rejected)"
    )
    where = parser.add_argument_group("the broker")
    where.add_argument("--mqtt", default="mqtt://127.0.0.1:1883", metavar="URL", help="mqtt:// or mqtts://host:port")
    where.add_argument("--ca", type=Path, metavar="PEM", help="CA of an mqtts broker and of the enrolment server")
    enrolment = parser.add_argument_group("enrolment of real devices (a certificate for each)")
    enrolment.add_argument("--enrolment-url", metavar="URL", help="https://host:port, checked against --ca")
    enrolment.add_argument("--claim-cert", type=Path, metavar="PEM", help="claim certificate of their batch")
    enrolment.add_argument("--claim-key", type=Path, metavar="PEM", help="key of that certificate")
    enrolment.add_argument("--enrol-at-once", type=int, default=16, metavar="N", help="so many ask at a time (16)")
    enrolment.add_argument("--enrolment-report", type=Path, metavar="JSON", help="written when all are enrolled")
    faults = parser.add_argument_group("what goes wrong")
    faults.add_argument("--seed", type=int, default=0, help="of everything below (0)")
    faults.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="RULE",
        help="[version=V,] and shares of fail, crash, no-confirm, silent, as in crash=2%%,fail=1%%; repeatable",
    )
    faults.add_argument("--slow", default="0%", metavar="SHARE", help="of real devices with a slow link (0%%)")
    faults.add_argument("--slow-bytes-per-second", type=float, default=20_000, metavar="B", help="its speed (20000)")
    faults.add_argument("--late", default="0%", metavar="SHARE", help="of devices that arrive late (0%%)")
    faults.add_argument("--late-seconds", type=float, default=30, metavar="S", help="by at most (30)")
    pace = parser.add_argument_group("rhythm, in seconds")
    for name, default, what in (
        ("poll", 900.0, "asks without a hint this often, at most"),
        ("retry", 2.0, "asks again after an empty answer, doubled each time up to --poll"),
        ("heartbeat", 0.0, "between heartbeats of real devices; 0 for none"),
        ("refused", 900.0, "asks again after an enrolment was refused"),
        ("confirm-within", 300.0, "for each try of a new image to reach the gateway"),
        ("answer-within", 15.0, "waits so long for an answer"),
    ):
        pace.add_argument(f"--{name}", type=float, default=default, metavar="S", help=f"{what} ({default:g})")
    run = parser.add_argument_group("the run")
    run.add_argument("--simulate", action="store_true", help="simulated devices: no download, no disk")
    run.add_argument("--connections", type=int, metavar="K", help="simulated devices share K connections (one each)")
    run.add_argument("--no-ask", action="store_true", help="simulated devices wait for a hint instead of asking first")
    run.add_argument("--seconds", type=float, metavar="S", help="stop after (never)")
    run.add_argument("--ready-file", type=Path, metavar="FILE", help="written when all are connected and subscribed")
    run.add_argument("--report", type=Path, metavar="JSON", help="written at the end")
    return parser


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
