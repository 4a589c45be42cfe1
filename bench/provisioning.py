"""`python -m bench provisioning`: devices that come for the first time, until all of them are `active`.

A fresh stack with TLS, a claim batch, and a pool of client processes whose devices make a key, enrol over HTTPS, connect
over MQTT with TLS, get and report their configuration and send a heartbeat. The clock runs from the first request to the
moment when the last device is `active`. What the client processes use is given apart: a fleet brings its own processors.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table
from temporalio.client import Client

from bench.newcomers import NewcomersTask
from bench.sampling import Sampler
from cli.claim import make_claim
from devstack.broker import BrokerKind
from devstack.stack import EmbeddedStack
from models.errors import UnavailableError
from models.identity import ClaimBatchSpec
from models.ids import provision_workflow_id
from models.settings import Settings
from store.engine import Database
from workflows.client import connect

BATCH = "bench"
AT_ONCE = 64
LONGEST_SECONDS = 900.0
POLL_SECONDS = 0.2
DESCRIBED = 50
"""Workflows whose history is counted, spread over the batch."""
PIECES = {"postgres": "postgresql"}
CLIENTS = "clients"


@dataclass(frozen=True)
class ProvisioningConfig:
    """What to run: `at_once` devices at one time, shared by `processes` client processes."""

    devices: int = 1_000
    at_once: int = AT_ONCE
    processes: int = 2
    broker: BrokerKind | None = None

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """The options of `python -m bench provisioning`."""
        default = ProvisioningConfig()
        for name, metavar, text in (
            ("devices", "N", "devices that enrol"),
            ("at-once", "N", "devices under way at one time"),
            ("processes", "N", "client processes that share them"),
        ):
            value = getattr(default, name.replace("-", "_"))
            parser.add_argument(f"--{name}", type=int, default=value, metavar=metavar, help=f"{text} (%(default)s)")
        parser.add_argument(
            "--broker", choices=("mosquitto", "nats"), help="MQTT broker (mosquitto where it is installed)"
        )

    @classmethod
    def of(cls, options: argparse.Namespace) -> "ProvisioningConfig":
        """From those options."""
        return cls(options.devices, options.at_once, options.processes, options.broker)


@dataclass
class Bench:
    """One run on one stack."""

    config: ProvisioningConfig
    folder: Path
    stack: EmbeddedStack
    db: Database
    client: Client

    async def run(self) -> dict[str, Any]:
        """Everybody comes; the figures by their names."""
        serials = [f"SN-{number:06d}" for number in range(self.config.devices)]
        await self._make_batch(serials)
        async with self._clients(serials) as clients:
            sampler = Sampler(lambda: self._pids(clients))
            async with sampler:
                for process in clients:
                    assert process.stdin is not None
                    process.stdin.write(b"go\n")
                reports = await asyncio.gather(*(_report(process) for process in clients))
                await self._until_active()
        states = await self._states()
        return self._costs(sampler) | {
            "states": states,
            "clients": _together(reports),
            "history_events_per_device": await self._history_events(serials),
        }

    async def _make_batch(self, serials: list[str]) -> None:
        endpoints = self.stack.endpoints
        keys = {"ca_dir": Path(str(endpoints.ca_dir)), "ca_passphrase_file": Path(str(endpoints.ca_passphrase_file))}
        spec = ClaimBatchSpec(
            name=BATCH,
            device_type="motor",
            site_id="berlin",
            config={"heartbeatSeconds": 60},
            max_devices=len(serials),
            expires_at=datetime.now(UTC) + timedelta(hours=1),
        )
        await make_claim(self.db, self.stack.settings.model_copy(update=keys), spec, [], "bench", self.folder / "claim")

    @asynccontextmanager
    async def _clients(self, serials: list[str]) -> AsyncIterator[list[asyncio.subprocess.Process]]:
        """Client processes that wait for the word."""
        processes, count = [], min(self.config.processes, len(serials))
        files = self.folder / "devices"
        files.mkdir()
        with self.stack.state.log("newcomers").open("ab") as log:
            for number in range(count):
                task = self._task(serials[number::count], files, max(1, self.config.at_once // count))
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "bench.newcomers",
                    stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log, limit=2**20,
                )  # fmt: skip
                assert process.stdin is not None and process.stdout is not None
                processes.append(process)
                process.stdin.write(task.model_dump_json().encode() + b"\n")
                if await process.stdout.readline() != b"ready\n":
                    raise UnavailableError(f"the devices' process did not start; see {log.name}")
        try:
            yield processes
        finally:
            for process in processes:
                if process.returncode is None:
                    process.terminate()
                await process.wait()

    def _task(self, serials: list[str], files: Path, at_once: int) -> NewcomersTask:
        endpoints, claim = self.stack.endpoints, self.folder / "claim"
        assert endpoints.mqtt_host and endpoints.mqtt_port and endpoints.enrolment_url
        return NewcomersTask(
            enrolment_url=endpoints.enrolment_url,
            mqtt_host=endpoints.mqtt_host,
            mqtt_port=endpoints.mqtt_port,
            ca=claim / "ca.pem",
            claim_certificate=claim / "claim.pem",
            claim_key=claim / "claim.key",
            folder=files,
            serials=serials,
            at_once=at_once,
        )

    async def _until_active(self) -> None:
        try:
            async with asyncio.timeout(LONGEST_SECONDS):
                while (await self._states()).get("active", 0) < self.config.devices:
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError as error:
            raise UnavailableError(
                f"not every device became active within {LONGEST_SECONDS:.0f} s: {await self._states()}"
            ) from error

    async def _states(self) -> dict[str, int]:
        async with self.db.pool.connection() as connection:
            cursor = await connection.execute("SELECT status, count(*) FROM devices GROUP BY status ORDER BY status")
            return dict(await cursor.fetchall())

    def _pids(self, clients: list[asyncio.subprocess.Process]) -> dict[str, list[int]]:
        found = {PIECES.get(name, name): pids for name, pids in self.stack.pids().items() if name != "artifacts"}
        return found | {CLIENTS: [process.pid for process in clients]}

    def _costs(self, sampler: Sampler) -> dict[str, Any]:
        devices = self.config.devices
        return {
            "seconds": sampler.seconds,
            "devices_per_second": devices / sampler.seconds,
            "cpu_seconds_per_1000": {name: 1000 * seconds / devices for name, seconds in sampler.cpu.items()},
            "peak_memory_mib": sampler.peak_mib,
            "others_share_of_machine": sampler.others_share,
        }

    async def _history_events(self, serials: list[str]) -> float:
        """Of some workflows, on average; they end a moment after the device is active."""
        step = max(1, len(serials) // DESCRIBED)
        lengths = []
        for serial in serials[::step]:
            handle = self.client.get_workflow_handle(provision_workflow_id(serial))
            await asyncio.wait_for(handle.result(), LONGEST_SECONDS)
            lengths.append((await handle.describe()).history_length)
        return statistics.mean(lengths)


async def run(config: ProvisioningConfig) -> dict[str, Any]:
    """A stack in a temporary folder, a fleet of newcomers, and everything taken down."""
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as name:
        folder = Path(name)
        async with EmbeddedStack(folder / "state", settings=Settings(), broker=config.broker) as stack:
            db = Database(str(stack.endpoints.database_url))
            await db.open()
            client = await connect(str(stack.endpoints.temporal_address), stack.settings.temporal_namespace)
            try:
                figures = await Bench(config, folder, stack, db, client).run()
            finally:
                await db.close()
            broker = stack.broker_kind
    given = {"devices": config.devices, "at_once": config.at_once, "processes": config.processes}
    return given | {"broker": broker, "cores": os.cpu_count()} | figures


def is_right(figures: dict[str, Any]) -> bool:
    """Whether every device is active and none gave up."""
    return bool(figures["states"] == {"active": figures["devices"]} and figures["clients"]["gave_up"] == 0)


def show(console: Console, figures: dict[str, Any]) -> None:
    """A figure in each line."""
    title = f"Provisioning of {figures['devices']:,} devices, {figures['at_once']} at a time, {figures['cores']} cores"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name in ("seconds", "devices_per_second", "history_events_per_device"):
        table.add_row(name, f"{figures[name]:,.1f}")
    for step, seconds in figures["clients"]["p50_seconds"].items():
        table.add_row(f"{step}, median seconds", f"{seconds:.2f}")
    table.add_section()
    table.add_row("cpu_seconds_per_1000")
    for name, seconds in _by_cost(figures):
        table.add_row(f"  {name}", f"{seconds:.2f}")
    console.print(table)
    for name, times in figures["clients"]["again"].items():
        console.print(f"{times} times a device had to try again to {name}", highlight=False)
    if not is_right(figures):
        console.print(f"not every device went through: {figures['states']}", style="red", highlight=False)
    if figures["others_share_of_machine"] > 0.1:
        share = f"{100 * figures['others_share_of_machine']:.0f} %"
        console.print(
            f"other programs used {share} of this machine meanwhile: measure again on a quiet one", highlight=False
        )


def _by_cost(figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The dearest first, then their sum without the clients'."""
    costs = figures["cpu_seconds_per_1000"]
    yield from sorted(costs.items(), key=lambda item: -item[1])
    yield f"all but {CLIENTS}", sum(seconds for name, seconds in costs.items() if name != CLIENTS)


async def _report(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), LONGEST_SECONDS)
    if not line:
        raise UnavailableError("a process of devices ended before they had gone through")
    found: dict[str, Any] = orjson.loads(line)
    return found


def _together(reports: list[dict[str, Any]]) -> dict[str, Any]:
    again: dict[str, int] = {}
    for report in reports:
        for name, times in report["again"].items():
            again[name] = again.get(name, 0) + times
    return {
        "gave_up": sum(report["gave_up"] for report in reports),
        "again": again,
        "p50_seconds": _of_steps(reports, "p50_seconds", statistics.median),
        "p99_seconds": _of_steps(reports, "p99_seconds", max),
    }


def _of_steps(reports: list[dict[str, Any]], name: str, of: Any) -> dict[str, float]:
    steps = {step for report in reports for step in report[name]}
    return {step: of([report[name][step] for report in reports if step in report[name]]) for step in sorted(steps)}
