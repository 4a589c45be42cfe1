"""`python -m bench`: measured rollouts, lookups, provisioning and heartbeats on this machine.

    python -m bench rollout --devices 2000 --json figures.json     one rollout
    python -m bench lookups --json figures.json                    looking devices up, with and without Redis
    python -m bench provisioning --json figures.json               devices that enrol, until all are active
    python -m bench heartbeats --json figures.json                 heartbeats, durable, per second
    python -m bench all --folder bench-results                     500, 2,000 and 10,000 devices, and the other three

Exit status 1: a rollout did not succeed, a count or an answer was wrong. A target of speed that is missed is reported, not failed:
it depends on the machine.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import uvloop
from rich.console import Console

from bench import heartbeats, heartbeats_report, lookups, provisioning
from bench.report import complete, show
from bench.rollout import IN_FLIGHT, BenchConfig, run
from models.errors import TidegateError
from models.settings import Settings
from observe import logs

Part = Callable[[argparse.Namespace, Console], bool]
"""Measures, shows and saves; whether everything was right."""
SIZES = (500, 2_000, 10_000)


def main() -> int:
    """Run what the arguments say; the exit status."""
    options = _parser().parse_args()
    logs.configure("bench", Settings().model_copy(update={"log_level": "WARNING"}))
    console = Console()
    parts: dict[str, Sequence[Part]] = {
        "rollout": [_rollouts],
        "lookups": [_lookups],
        "provisioning": [_provisioning],
        "heartbeats": [_heartbeats],
        "all": [_rollouts, _lookups, _provisioning, _heartbeats],
    }
    try:
        right = [part(options, console) for part in parts[options.command]]
    except TidegateError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    return 0 if all(right) else 1


def _rollouts(options: argparse.Namespace, console: Console) -> bool:
    sizes = SIZES if options.command == "all" else (options.devices,)
    runs = []
    for devices in sizes:
        console.print(f"rollout of {devices:,} devices ...")
        config = BenchConfig(
            devices, options.failures, options.seed, options.broker, options.connections, options.in_flight
        )
        runs.append(complete(asyncio.run(run(config))))
        _save(options, f"rollout-{devices}", runs[-1])
    show(console, runs)
    return all(map(is_right, runs))


def _lookups(options: argparse.Namespace, console: Console) -> bool:
    console.print("lookups ...")
    config = lookups.LookupsConfig() if options.command == "all" else lookups.LookupsConfig.of(options)
    figures = uvloop.run(lookups.run(config))
    _save(options, "lookups", figures)
    lookups.show(console, figures)
    return bool(figures["wrong_answers"] == 0)


def _provisioning(options: argparse.Namespace, console: Console) -> bool:
    whole = options.command == "all"
    config = provisioning.ProvisioningConfig() if whole else provisioning.ProvisioningConfig.of(options)
    console.print(f"provisioning of {config.devices:,} devices ...")
    figures = asyncio.run(provisioning.run(config))
    _save(options, "provisioning", figures)
    provisioning.show(console, figures)
    return provisioning.is_right(figures)


def _heartbeats(options: argparse.Namespace, console: Console) -> bool:
    whole = options.command == "all"
    config = heartbeats.HeartbeatsConfig() if whole else heartbeats.HeartbeatsConfig.of(options)
    console.print(f"heartbeats of {config.devices:,} devices ...")
    figures = asyncio.run(heartbeats.run(config))
    _save(options, "heartbeats", figures)
    heartbeats_report.show(console, figures)
    return heartbeats_report.is_right(figures)


def is_right(figures: dict[str, Any]) -> bool:
    """Whether the rollout did what it should, however fast."""
    return bool(
        figures["outcome"] == "succeeded"
        and figures["crossing"]["outcome"] == "halted"
        and figures["admitted_after_crossing"] == 0
        and figures["counted_minus_true"] == 0
        and figures["crossing"]["counted_minus_true"] == 0
        and figures["devices_disagreeing"] == 0
    )


def _save(options: argparse.Namespace, name: str, figures: dict[str, Any]) -> None:
    path = options.folder / f"{name}.json" if options.command == "all" else options.json
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(orjson.dumps(figures, option=orjson.OPT_INDENT_2) + b"\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measured rollouts of simulated devices, lookups, provisioning and heartbeats.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("rollout", help="one rollout", description="One rollout in three waves.")
    one.add_argument("--devices", type=int, required=True, metavar="N", help="size of the fleet")
    one.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    look = commands.add_parser(
        "lookups", help="devices looked up", description="Looking devices up, with and without Redis."
    )
    look.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    lookups.LookupsConfig.add_arguments(look)
    enrol = commands.add_parser(
        "provisioning",
        help="devices that enrol",
        description="Devices that come for the first time, until all are active.",
    )
    enrol.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    provisioning.ProvisioningConfig.add_arguments(enrol)
    beat = commands.add_parser(
        "heartbeats",
        help="durable heartbeats",
        description="Durable heartbeats per second, against the broker alone, PostgreSQL alone, and one by one.",
    )
    beat.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    heartbeats.HeartbeatsConfig.add_arguments(beat)
    sizes = ", ".join(f"{size:,}" for size in SIZES)
    every = commands.add_parser(
        "all", help="all of it", description=f"Rollouts of {sizes} devices, lookups, provisioning, and heartbeats."
    )
    every.add_argument(
        "--folder",
        type=Path,
        default=Path("bench-results"),
        metavar="DIR",
        help="write a file for each there (%(default)s)",
    )
    for command in (one, every):
        command.add_argument(
            "--failures",
            default="fail=1%,crash=1%",
            metavar="SHARES",
            help="shares of failing devices (fail=1%%,crash=1%%)",
        )
        command.add_argument("--seed", type=int, default=1, help="which devices fail (%(default)s)")
        command.add_argument(
            "--broker", choices=("mosquitto", "nats"), help="MQTT broker (mosquitto where it is installed)"
        )
        command.add_argument("--connections", type=int, metavar="K", help="devices share K connections (one each)")
        command.add_argument(
            "--in-flight", type=int, default=IN_FLIGHT, metavar="N", help="devices at one moment (%(default)s)"
        )
    return parser


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Threads of Temporal's client outlive the event loop and now and then crash the interpreter's own shutdown.
    os._exit(status)
