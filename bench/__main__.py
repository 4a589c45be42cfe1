"""`python -m bench`: measured rollouts on this machine.

    python -m bench rollout --devices 2000 --json figures.json     one of them
    python -m bench all --folder bench-results                     500, 2,000 and 10,000 devices

Exit status 1: a rollout did not succeed or a count was wrong. A target of speed that is missed is reported, not failed:
it depends on the machine.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from bench.report import complete, show
from bench.rollout import IN_FLIGHT, BenchConfig, run
from models.errors import TidegateError
from models.settings import Settings
from observe import logs

SIZES = (500, 2_000, 10_000)


def main() -> int:
    """Run what the arguments say; the exit status."""
    options = _parser().parse_args()
    logs.configure("bench", Settings().model_copy(update={"log_level": "WARNING"}))
    console = Console()
    sizes = SIZES if options.command == "all" else (options.devices,)
    runs = []
    for devices in sizes:
        console.print(f"rollout of {devices:,} devices ...")
        config = BenchConfig(
            devices, options.failures, options.seed, options.broker, options.connections, options.in_flight
        )
        try:
            figures = complete(asyncio.run(run(config)))
        except TidegateError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        except (KeyboardInterrupt, asyncio.CancelledError):
            return 130
        runs.append(figures)
        _save(options, devices, figures)
    show(console, runs)
    return 0 if all(map(is_right, runs)) else 1


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


def _save(options: argparse.Namespace, devices: int, figures: dict[str, Any]) -> None:
    path = options.folder / f"rollout-{devices}.json" if options.command == "all" else options.json
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(orjson.dumps(figures, option=orjson.OPT_INDENT_2) + b"\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measured rollouts of simulated devices.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("rollout", help="one rollout", description="One rollout in three waves.")
    one.add_argument("--devices", type=int, required=True, metavar="N", help="size of the fleet")
    one.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    sizes = ", ".join(f"{size:,}" for size in SIZES)
    every = commands.add_parser("all", help="all sizes", description=f"Rollouts of {sizes} devices.")
    every.add_argument(
        "--folder",
        type=Path,
        default=Path("bench-results"),
        metavar="DIR",
        help="write a file per rollout there (%(default)s)",
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
