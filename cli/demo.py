"""`starter.py demo`: the whole of Tidegate in a few minutes, on one machine, with real devices and real bytes.

An embedded stack, a fleet of device agents with slots on disk, and two rollouts. The devices are registered beforehand,
and each enrols with the claim certificate of its batch: it makes its own key, gets its own certificate, connects to the
broker with it, takes its configuration, and is active. No device has a password. The first release is bad: some devices
crash after booting it, the others never reach the gateway, so all of them fall back by themselves and the gate halts it
in its canary wave. The second is good and goes through three waves, while a worker is killed on the way.

What is printed and written at the end is read from PostgreSQL, from Temporal and from the devices' disks.
"""

import asyncio
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from temporalio.client import Client

from activities.artifact_store import ArtifactStore
from agent.enrolment import Claim
from agent.slots import Slots
from agent.storage import PosixStorage
from cli.claim import make_claim
from cli.demo_images import demo_images
from cli.publish import publish_image
from devstack.stack import EmbeddedStack
from devstack.state import StateDirectory
from domain.device_rows import Format
from firmware.keys import generate_private_key, save_public_key
from models.artifacts import BuildDeltaInput
from models.device import DeviceFilter, DeviceStatus
from models.errors import RefusedError, TidegateError
from models.identity import ClaimBatchSpec
from models.ids import rollout_workflow_id, wave_workflow_id
from models.rollout import Outcome, RolloutResult, StartRolloutInput
from models.settings import Settings
from models.spec import RolloutSpec
from models.views import RolloutView
from observe import logs
from store.deltas import DeltaStore
from store.engine import Database
from store.registry import Registry
from store.rollouts import RolloutStore
from workflows.client import connect, start_rollout

PRODUCT, HARDWARE = "motor-controller", "motor"
OLD_VERSION, BAD_VERSION, NEW_VERSION = "1.2.0", "1.3.0-rc1", "1.3.0"
BAD_FAULTS = "crash=70%,no-confirm=30%"
"""What devices meet that boot the bad release. Either way they fall back to the old image by themselves."""
CONFIRM_SECONDS = 4.0
"""How long a device of the demo tries to reach the gateway after booting a new image, before it falls back."""
READY_SECONDS = 120.0
BATCH = "motors-1"
CONFIG = {"heartbeatSeconds": 5}
"""The devices' first configuration."""
MARKER = ".tidegate-demo"
CODE = Path(__file__).parent.parent


@dataclass(frozen=True)
class DemoConfig:
    """What to run. `base` and `image` None: images are made from machine code of this computer."""

    devices: int = 60
    base: Path | None = None
    image: Path | None = None
    seed: int = 1
    state_dir: Path = Path(".tidegate/demo")
    json_path: Path | None = None
    keep: bool = False
    kill_worker: bool = True


@dataclass
class Demo:
    """One run."""

    config: DemoConfig
    console: Console
    stack: EmbeddedStack
    db: Database
    client: Client
    old: bytes
    new: bytes
    notes: list[str] = field(default_factory=list)
    fleet: subprocess.Popen[bytes] | None = None

    @property
    def bad(self) -> bytes:
        """The bad release: the new image with its last byte changed, so that it is another image of the same size."""
        return self.new[:-1] + bytes([self.new[-1] ^ 0xFF])

    # --- the acts ----------------------------------------------------------------------------------------------------

    async def run(self) -> dict[str, Any]:
        """All of it. Returns the summary."""
        started = time.monotonic()
        await self.publish()
        await self.import_fleet()
        claim = await self.make_batch()
        await self.start_fleet(claim)
        enrolment = await self.enrolled()
        bad = await self.roll(self.bad_spec(), after_start=None)
        await self.until(lambda: self.running_everywhere() == {sha256(self.old)}, "devices back on the old image")
        after_bad = self.running()
        good = await self.roll(self.good_spec(), after_start=self.kill_worker if self.config.kill_worker else None)
        summary: dict[str, Any] = {
            "devices": self.config.devices,
            "seed": self.config.seed,
            "seconds": round(time.monotonic() - started, 1),
            "ui_url": self.stack.endpoints.ui_url,
            "enrolment": enrolment,
            "images": await self.image_facts(),
            "rollouts": [
                await self.rollout_summary(bad, after_bad),
                await self.rollout_summary(good, self.running()),
            ],
            "worker_killed": any("worker" in note for note in self.notes),
        }
        summary["as_expected"] = not (wrong := self.mistakes(summary))
        summary["mistakes"] = wrong
        return summary

    async def publish(self) -> None:
        """Three releases, signed with a key that stays in the demo's folder."""
        keys = self.config.state_dir / "release-key"
        keys.mkdir(exist_ok=True)
        key = generate_private_key()
        save_public_key(keys / "release.pub", key.public_key())
        store = ArtifactStore.open(str(self.stack.endpoints.artifact_store))
        for version, image in ((OLD_VERSION, self.old), (BAD_VERSION, self.bad), (NEW_VERSION, self.new)):
            await publish_image(
                self.db, store, key, image, product=PRODUCT, version=version, hardware=(HARDWARE,), published_by="demo"
            )
        self.say(
            f"published {PRODUCT} {OLD_VERSION}, {BAD_VERSION} (bad) and {NEW_VERSION}: {len(self.new):,} bytes each"
        )

    async def import_fleet(self) -> None:
        """The devices, as a file that `device import` takes."""
        path = self.config.state_dir / "devices.jsonl"
        lines = [
            orjson.dumps(
                {
                    "device_id": f"motor-{number:04d}",
                    "device_type": HARDWARE,
                    "serial_number": serial_number(number),
                    "status": str(DeviceStatus.PROVISIONING),
                    "site_id": ("berlin", "turin", "lyon")[number % 3],
                    "tags": {"environment": "production"},
                    "firmware_version": OLD_VERSION,
                    "firmware_sha256": sha256(self.old),
                }
            )
            for number in range(1, self.config.devices + 1)
        ]
        path.write_bytes(b"\n".join(lines) + b"\n")
        with path.open("rb") as file:
            await Registry(self.db).import_devices(file, str(path), Format.JSON_LINES)
        self.say(f"registered {self.config.devices} devices in three sites, all on {OLD_VERSION}")

    async def make_batch(self) -> Claim:
        """The batch that the devices were made in: these serial numbers alone may enrol, for an hour."""
        endpoints, now = self.stack.endpoints, datetime.now(UTC)
        settings = self.stack.settings.model_copy(
            update={
                "ca_dir": Path(str(endpoints.ca_dir)),
                "ca_passphrase_file": Path(str(endpoints.ca_passphrase_file)),
            }
        )
        spec = ClaimBatchSpec(
            name=BATCH,
            device_type=HARDWARE,
            site_id="berlin",
            config=CONFIG,
            listed_only=True,
            max_devices=self.config.devices,
            expires_at=now + timedelta(hours=1),
        )
        serials = [serial_number(number) for number in range(1, self.config.devices + 1)]
        folder = self.config.state_dir / "claim"
        await make_claim(self.db, settings, spec, serials, "demo", folder)
        self.say(f"made batch {BATCH}: {len(serials)} serial numbers may enrol with its claim certificate, for an hour")
        return Claim(folder / "claim.pem", folder / "claim.key")

    async def enrolled(self) -> dict[str, Any]:
        """Wait until every device is active: it has its certificate, its configuration, and was heard of."""
        started, registry = time.monotonic(), Registry(self.db)
        report = self.config.state_dir / "enrolment.json"
        await self.until(report.exists, "the fleet to enrol", READY_SECONDS)
        found: dict[str, Any] = orjson.loads(report.read_bytes())
        self.say(f"{found['enrolled']} devices have certificates of their own after {found['seconds']} s")
        wanted = DeviceFilter(statuses=(DeviceStatus.ACTIVE,))

        async def all_active() -> bool:
            return await registry.count(wanted) == self.config.devices

        await self.until(all_active, "the devices to become active", READY_SECONDS)
        found["active_seconds"] = round(time.monotonic() - started, 1)
        self.say(f"{self.config.devices} devices are active: connected, configured, heard of")
        return found

    async def start_fleet(self, claim: Claim) -> None:
        """A process with one real agent per device: its own key, MQTT session, downloads, slots on disk."""
        state, endpoints = self.config.state_dir, self.stack.endpoints
        base = state / "base.bin"
        base.write_bytes(self.old)
        command = [sys.executable, "-m", "agent.fleet", "--devices-file", str(state / "devices.jsonl")]
        command += ["--state", str(state / "fleet"), "--base", str(base), "--base-version", OLD_VERSION]
        command += ["--product", PRODUCT, "--release-key", str(state / "release-key" / "release.pub")]
        command += ["--order-key", str(Path(str(endpoints.order_key)).with_suffix(".pub"))]
        command += ["--mqtt", f"mqtts://{endpoints.mqtt_host}:{endpoints.mqtt_port}", "--ca", str(endpoints.ca)]
        command += ["--enrolment-url", str(endpoints.enrolment_url), "--seed", str(self.config.seed)]
        command += ["--claim-cert", str(claim.certificate), "--claim-key", str(claim.private_key)]
        command += ["--enrolment-report", str(state / "enrolment.json")]
        command += ["--fault", f"version={BAD_VERSION},{BAD_FAULTS}", "--confirm-within", str(CONFIRM_SECONDS)]
        command += ["--poll", "10", "--retry", "1", "--heartbeat", "5", "--answer-within", "5"]
        command += ["--report", str(state / "fleet.json")]
        with (state / "logs" / "fleet.log").open("wb") as log:
            environment = self.stack.env()
            self.fleet = await asyncio.to_thread(
                subprocess.Popen, command, stdout=log, stderr=log, env=environment, cwd=CODE
            )

    def bad_spec(self) -> RolloutSpec:
        """Waves of 10 %, 50 % and all, four devices at a time."""
        waves = [("canary", "10%"), ("half", "50%"), ("fleet", "100%")]
        return self.spec(BAD_VERSION, [{"name": name, "size": size} for name, size in waves], in_flight=4)

    def good_spec(self) -> RolloutSpec:
        """Waves of 5 %, 25 % and all, with a short soak."""
        waves = [("canary", "5%"), ("early", "25%"), ("fleet", "100%")]
        return self.spec(
            NEW_VERSION, [{"name": name, "size": size, "soak": "3s"} for name, size in waves], in_flight=25
        )

    def spec(self, version: str, waves: list[dict[str, Any]], in_flight: int) -> RolloutSpec:
        """A specification over the whole fleet."""
        return RolloutSpec.model_validate(
            {
                "name": f"motor-{version}",
                "release": f"{PRODUCT}@{version}",
                "target": {"type": HARDWARE, "tags": {"environment": "production"}},
                "waves": waves,
                "deadlines": {"accept": "10m", "download": "5m", "install": "2m", "confirm": "2m"},
                "pace": {"in_flight": in_flight, "per_minute": None},
            }
        )

    async def roll(
        self, spec: RolloutSpec, after_start: Callable[[RolloutSpec], Coroutine[Any, Any, None]] | None
    ) -> RolloutResult:
        """Start a rollout, show it until it ends."""
        self.say(f"\n[bold]rollout {spec.name}[/bold]  {self.stack.endpoints.ui_url}")
        handle = await start_rollout(self.client, StartRolloutInput(spec=spec, requested_by="demo"))
        ending = asyncio.create_task(handle.result())
        extra = asyncio.create_task(after_start(spec)) if after_start else None
        await self.show_until(spec.name, ending)
        if extra is not None:
            await extra
        result = await ending
        self.say(f"  [bold]{result.outcome}[/bold]: {result.reason}")
        return result

    async def kill_worker(self, spec: RolloutSpec) -> None:
        """`kill -9` the worker in the middle of the second wave; start another one."""
        store = RolloutStore(self.db)

        async def second_wave_is_busy() -> bool:
            with suppress(TidegateError):
                view = await store.show(spec.name)
                return len(view.waves) > 1 and view.waves[1].counts.terminal > 0
            return False

        await self.until(second_wave_is_busy, "the second wave")
        self.stack.kill("worker")
        self.note("kill -9 of the worker in the middle of the second wave")
        await asyncio.sleep(1)
        await self.stack.start("worker")
        self.note("another worker has taken over")

    # --- looking -----------------------------------------------------------------------------------------------------

    async def show_until(self, name: str, ending: "asyncio.Task[RolloutResult]") -> None:
        """A line whenever something changed, until the rollout ends."""
        store, last = RolloutStore(self.db), ""
        while not ending.done():
            await asyncio.wait([ending], timeout=0.5)
            with suppress(TidegateError):
                line = progress_line(await store.show(name))
                if line != last:
                    self.say(f"  {line}")
                last = line

    async def rollout_summary(self, result: RolloutResult, running: dict[str, str]) -> dict[str, Any]:
        """What Temporal, PostgreSQL and the disks say of one rollout."""
        found: dict[str, int] = {}
        for digest in running.values():
            found[digest] = found.get(digest, 0) + 1
        return {
            "name": result.name,
            "outcome": result.outcome,
            "reason": result.reason,
            "devices": result.devices,
            "succeeded": result.succeeded,
            "failed": result.failed,
            "exposed": result.exposed,
            "by_delta": result.by_delta,
            "waves": [orjson.loads(wave.model_dump_json()) for wave in result.waves],
            "history_events": await self.history_events(result),
            "failures": {
                str(kind): count for kind, count in (await RolloutStore(self.db).show(result.name)).failures.items()
            },
            "active_slots": {
                "old": found.get(sha256(self.old), 0),
                "bad": found.get(sha256(self.bad), 0),
                "new": found.get(sha256(self.new), 0),
            },
        }

    async def history_events(self, result: RolloutResult) -> int:
        """Events of the rollout's workflow and of its waves'."""
        ids = [rollout_workflow_id(result.name)]
        ids += [wave_workflow_id(result.name, wave.wave) for wave in result.waves if wave.opened_at]
        described = [await self.client.get_workflow_handle(workflow_id).describe() for workflow_id in ids]
        return sum(description.history_length for description in described)

    def running(self) -> dict[str, str]:
        """The sha256 of what lies in each device's active slot, from its disk."""
        found = {}
        for folder in sorted((self.config.state_dir / "fleet").iterdir()):
            slots = Slots(PosixStorage(folder))
            found[folder.name] = sha256(slots.image(slots.load().active))
        return found

    def running_everywhere(self) -> set[str]:
        """The different images in active slots."""
        return set(self.running().values())

    async def image_facts(self) -> dict[str, Any]:
        """Hashes and sizes, and the delta from the old to the new image, as the registry has it."""
        found = await DeltaStore(self.db).find(
            BuildDeltaInput(base_sha256=sha256(self.old), target_sha256=sha256(self.new))
        )
        delta = found.delta if found else None
        facts: dict[str, Any] = {
            name: {"sha256": sha256(image), "size": len(image)}
            for name, image in (("old", self.old), ("bad", self.bad), ("new", self.new))
        }
        facts["new"]["delta"] = delta and {
            "sha256": delta.sha256,
            "size": delta.size_bytes,
            "codec": delta.codec,
            "percent_of_image": round(100 * delta.size_bytes / len(self.new), 2),
        }
        return facts

    def mistakes(self, summary: dict[str, Any]) -> list[str]:
        """What did not go as it should; empty when all is well."""
        bad, good = summary["rollouts"]
        devices, enrolled = self.config.devices, summary["enrolment"]["enrolled"]
        checks = {
            f"{enrolled} of {devices} devices have enrolled": enrolled == devices,
            f"the bad release ended {bad['outcome']}, expected halted": bad["outcome"] == Outcome.HALTED,
            f"the bad release reached {bad['exposed']} devices, expected at most 12": bad["exposed"] <= 12,
            f"{bad['active_slots']['old']} of {devices} devices were back on the old image": bad["active_slots"]["old"]
            == devices,
            f"the good release ended {good['outcome']}, expected succeeded": good["outcome"] == Outcome.SUCCEEDED,
            f"{good['active_slots']['new']} of {devices} devices run the new image": good["active_slots"]["new"]
            == devices,
            f"{good['by_delta']} of {devices} devices were updated by delta": good["by_delta"] * 10 >= devices * 9,
        }
        return [text for text, holds in checks.items() if not holds]

    async def until(self, ready: Callable[[], Any], what: str, seconds: float = 180.0) -> None:
        """Wait for a condition. Raises RefusedError saying what did not come."""
        deadline = time.monotonic() + seconds
        while True:
            answer = ready()
            if (await answer) if asyncio.iscoroutine(answer) else answer:
                return
            if self.fleet is not None and self.fleet.poll() is not None:
                raise RefusedError(
                    f"the fleet ended with {self.fleet.returncode}; see logs/fleet.log in the state folder"
                )
            if time.monotonic() > deadline:
                raise RefusedError(f"waited {seconds:.0f} s for {what}; see {self.config.state_dir}/logs")
            await asyncio.sleep(0.2)

    def note(self, text: str) -> None:
        """Say and remember."""
        self.notes.append(text)
        self.say(f"  [yellow]{text}[/yellow]")

    def say(self, text: str) -> None:
        """To the person who watches."""
        self.console.print(text, highlight=False)

    def end_fleet(self) -> None:
        """Ask the fleet to end, and wait for it."""
        if self.fleet is not None and self.fleet.poll() is None:
            self.fleet.send_signal(signal.SIGTERM)
            try:
                self.fleet.wait(20)
            except subprocess.TimeoutExpired:
                self.fleet.kill()
                self.fleet.wait()


async def run_demo(config: DemoConfig, console: Console) -> dict[str, Any]:
    """Run the demo and return its summary; with `keep`, wait for Ctrl-C before everything stops."""
    config.state_dir.parent.mkdir(parents=True, exist_ok=True)
    clear(config.state_dir)
    demo_task = asyncio.current_task()
    assert demo_task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, demo_task.cancel)  # stops all of it in good order
    old, new = await asyncio.to_thread(demo_images, config.base, config.image, random.Random(config.seed))
    logs.configure("demo", Settings().model_copy(update={"log_level": "WARNING"}))
    console.print(
        "starting PostgreSQL, Temporal, a broker with TLS, artifact and enrolment server, worker and gateway ..."
    )
    settings = Settings().model_copy(update={"state_dir": config.state_dir})
    async with EmbeddedStack(config.state_dir, settings=settings) as stack:
        db = Database(str(stack.endpoints.database_url))
        await db.open()
        client = await connect(str(stack.endpoints.temporal_address), settings.temporal_namespace)
        demo = Demo(config, console, stack, db, client, old, new)
        try:
            summary = await demo.run()
            print_summary(console, summary)
            if config.json_path is not None:
                config.json_path.write_bytes(orjson.dumps(summary, option=orjson.OPT_INDENT_2) + b"\n")
            if config.keep:
                console.print(f"\nstill running; open {summary['ui_url']} - Ctrl-C stops everything")
                await wait_for_interrupt()
        finally:
            demo.end_fleet()
            await db.close()
    return summary


async def wait_for_interrupt() -> None:
    """Return at Ctrl-C or SIGTERM."""
    over, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, over.set)
    await over.wait()


def clear(state_dir: Path) -> None:
    """Make an empty folder for the run; a former demo's is removed, anything else is left alone and refused."""
    if state_dir.exists() and any(state_dir.iterdir()):
        if not (state_dir / MARKER).exists():
            raise RefusedError(f"{state_dir} is not empty and not a former demo's; give another --state")
        with StateDirectory(state_dir).locked():  # refuses while a demo runs there
            pass
        shutil.rmtree(state_dir)
    state_dir.mkdir(parents=True, exist_ok=True)
    (state_dir / MARKER).write_text("made by 'starter.py demo'; removed by its next run\n")
    (state_dir / "logs").mkdir(exist_ok=True)


def progress_line(view: RolloutView) -> str:
    """One line: every wave with its bar, what is in flight, what failed."""
    waves = []
    for wave in view.waves:
        counts = wave.counts
        done, width = counts.terminal, 8
        filled = width * done // counts.total if counts.total else 0
        colour = "red" if wave.tripped or wave.verdict == "halt" else "green" if wave.verdict == "promote" else "cyan"
        bar = f"[{colour}]{'█' * filled}[/{colour}]{'░' * (width - filled)}"
        failed = f" [red]{counts.gate_failed} failed[/red]" if counts.gate_failed else ""
        waves.append(f"{wave.name} {bar} {done}/{counts.total}{failed}")
    return f"{view.phase:<8} {'  '.join(waves)}"


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """The table at the end."""
    console.print(f"\n[bold]{summary['devices']} devices in {summary['seconds']} s[/bold]", highlight=False)
    enrolment = summary["enrolment"]
    console.print(
        f"{enrolment['enrolled']} devices enrolled with their own keys in {enrolment['seconds']} s, "
        f"all active after {enrolment['active_seconds']} s",
        highlight=False,
    )
    for rollout in summary["rollouts"]:
        slots = ", ".join(f"{count} {which}" for which, count in rollout["active_slots"].items() if count)
        colour = "green" if rollout["outcome"] == Outcome.SUCCEEDED else "red"
        console.print(f"\n{rollout['name']}  [{colour}]{rollout['outcome']}[/{colour}]", highlight=False)
        console.print(f"  {rollout['reason']}", highlight=False)
        console.print(
            f"  {rollout['exposed']} devices exposed, {rollout['succeeded']} succeeded ({rollout['by_delta']} by delta), "
            f"{rollout['failed']} failed; {rollout['history_events']} history events",
            highlight=False,
        )
        console.print(f"  images in active slots when it had ended: {slots}", highlight=False)
    delta = summary["images"]["new"]["delta"]
    if delta:
        console.print(f"\ndelta: {delta['size']:,} bytes, {delta['percent_of_image']} % of the image", highlight=False)
    console.print(f"Temporal Web UI: {summary['ui_url']}", highlight=False)
    for mistake in summary["mistakes"]:
        console.print(f"[red]not as expected: {mistake}[/red]", highlight=False)


def serial_number(number: int) -> str:
    """Of the demo's device of this number."""
    return f"SN-{number:06d}"


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()
