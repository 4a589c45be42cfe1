"""`job` against a whole running stack and real agents: what devices do, how they fail, what is tried again, what is said."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.storage import PosixStorage
from agent.tasks import TaskStore
from tests.integration.plant_setup import Plant, fleet_of, on_a_terminal, running

DEVICES = tuple(f"r{number}" for number in range(6))
LATER = "later"
PROGRAM = """\
#!/bin/sh
# What the devices of these tests do with a custom job: the document on standard input says it.
document=$(cat)
echo "$document" >> "$(dirname "$0")/custom.log"
case "$document" in
  *'"wait":true'*) sleep 8 ;;
  *'"fail":true'*) echo "pump 3 is blocked"; exit 7 ;;
esac
echo "done"
"""


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    with running(tmp_path_factory.mktemp("jobs")) as made:
        _furnish(made)
        program = made.folder / "program"
        program.write_text(PROGRAM)
        program.chmod(0o755)
        fleet = ("--state", str(made.folder / "devices"), "--custom-command", str(program), "--heartbeat", "2")
        with fleet_of(made, *fleet, "--fault", "version=_some-fail,fail=50%", "--seed", "3"):
            yield made


def _furnish(plant: Plant) -> None:
    lines = [_device(name, "r") for name in (*DEVICES, LATER)]
    (plant.folder / "fleet.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (plant.folder / "first.jsonl").write_text("\n".join(map(json.dumps, lines[:-1])) + "\n")
    (plant.folder / "later.jsonl").write_text(json.dumps(lines[-1]) + "\n")
    assert plant.run("device", "import", plant.folder / "first.jsonl").status == 0
    assert plant.run("release", "keygen", "--out", plant.folder / "release").status == 0
    (plant.folder / "1.2.0.bin").write_bytes(b"old" * 1000)


def _device(name: str, group: str) -> dict[str, Any]:
    return {"device_id": name, "device_type": "motor", "serial_number": f"S{name}", "site_id": "berlin",
            "tags": {"group": group}, "firmware_version": "1.2.0"}  # fmt: skip


def until(what: str, ready: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait for something that is on its way."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found


def document(plant: Plant, **fields: Any) -> Path:
    path = plant.folder / "document.json"
    path.write_text(json.dumps(fields))
    return path


def devices_of(plant: Plant, name: str, *more: str) -> dict[str, dict[str, Any]]:
    found = plant.run("job", "devices", name, "--json", *more).json["devices"]
    return {entry["device_id"]: entry for entry in found}


QUICK = ("--wait", "--json", "--timeout", "120s")


def test_a_restart_reboots_every_device_once_and_each_says_so_after_its_boot(plant: Plant) -> None:
    words = ("--operation", "restart", "--site", "berlin", "--tag", "group=r", "--max-parallel", "3", "--attempts", "2")
    ran = plant.run("job", "start", "restart-berlin", *words, *QUICK)
    assert ran.status == 0, ran.err
    first, *_, last = ran.json_lines
    assert (first["workflow_id"], first["devices"], first["operation"]) == ("job:restart-berlin", 6, "restart")
    assert {"outcome": "succeeded", "succeeded": 6, "failed": 0, "exit_status": 0}.items() <= last["result"].items()
    details = [entry["status_details"] for entry in devices_of(plant, "restart-berlin").values()]
    assert len({detail["bootId"] for detail in details}) == 6
    for name in DEVICES:
        log = (plant.folder / "devices" / name).resolve()
        assert TaskStore(PosixStorage(log)).state.finished["_restart-berlin"].status == "SUCCEEDED"
    assert "done with attempt 1 of 2" in plant.run("job", "explain", "restart-berlin", "r1", "--json").json["why"]
    again = plant.run("job", "start", "restart-berlin", *words)
    assert (again.status, "a job of this name has ended" in again.err) == (6, True)
    retry = plant.run("job", "retry", "restart-berlin")
    assert (retry.status, "no device of it has failed" in retry.err) == (6, True)


def test_a_config_sync_has_devices_take_and_report_a_configuration(plant: Plant) -> None:
    config = document(plant, heartbeatSeconds=3, colour="blue")
    ran = plant.run(
        "job", "start", "blue", "--operation", "config-sync", "--config", config, "--tag", "group=r", *QUICK
    )
    assert ran.status == 0, ran.err
    assert ran.json_lines[-1]["result"]["succeeded"] == 6
    shown = plant.run("device", "configuration", "r2", "--json").json
    assert "blue" in json.dumps(shown)
    assert devices_of(plant, "blue")["r2"]["status_details"]["configVersion"] == "1"


def test_custom_jobs_get_their_document_and_retry_takes_exactly_the_devices_that_have_failed(plant: Plant) -> None:
    path = document(plant, say="hello", fail=False)
    words = ("--operation", "custom", "--document", path, "--tag", "group=r")
    ran = plant.run("job", "start", "some-fail", *words, *QUICK)
    assert ran.status == 1, ran.err
    failed = {name for name, entry in devices_of(plant, "some-fail").items() if entry["state"] == "FAILED"}
    assert 0 < len(failed) < 6
    assert '"say":"hello"' in (plant.folder / "custom.log").read_text()
    shown = plant.run("job", "show", "some-fail", "--devices", "--failures")
    assert "custom has failed (simulated fault)" in shown.out and "internal" in shown.out
    assert "next: job retry some-fail" in shown.err
    said = plant.run("job", "explain", "some-fail", min(failed)).out
    assert "no attempt is left" in " ".join(said.split())
    again = plant.run("job", "retry", "some-fail", *QUICK)
    assert again.status == 0, again.err
    assert again.json_lines[0]["name"] == "some-fail-retry"
    assert set(devices_of(plant, "some-fail-retry")) == failed
    assert again.json_lines[-1]["result"]["succeeded"] == len(failed)


def test_a_failure_is_tried_again_after_a_pause_and_what_waits_is_explained(plant: Plant) -> None:
    path = document(plant, fail=True)
    words = ("--operation", "custom", "--document", path, "--id", "r0", "--attempts", "2", "--backoff", "20s")
    assert plant.run("job", "start", "blocked", *words).status == 0
    until("the first attempt", lambda: plant.run("job", "failures", "blocked", "--json").json["failures"])
    why = plant.run("job", "explain", "blocked", "r0", "--json").json["why"]
    assert "attempt 1 failed" in why and "waits for attempt 2 of 2 until" in why
    assert plant.run("job", "pause", "blocked", "--reason", "lunch").status == 0
    assert "the job is paused" in plant.run("job", "explain", "blocked", "r0", "--json").json["why"]
    assert plant.run("job", "resume", "blocked").status == 0
    outside = plant.run("job", "explain", "blocked", "r1")
    assert (outside.status, "does not match the target" in outside.err) == (2, True)
    ran = plant.run("job", "watch", "blocked", "--timeout", "90s")
    assert ran.status == 1, ran.err
    assert "'job retry blocked' tries them again" in ran.err
    failures = plant.run("job", "failures", "blocked", "--json").json["failures"]
    assert [entry["attempt"] for entry in failures] == [2, 1]
    assert "program ended with 7: pump 3 is blocked" in failures[0]["reason"]


def test_a_job_that_is_cancelled_by_force_does_not_wait_for_devices_in_progress(plant: Plant) -> None:
    path = document(plant, wait=True)
    words = ("--operation", "custom", "--document", path, "--tag", "group=r", "--max-parallel", "2")
    assert plant.run("job", "start", "slow", *words).status == 0
    until("two in progress", lambda: len(devices_of(plant, "slow", "--status", "IN_PROGRESS")) == 2)
    queued = min(devices_of(plant, "slow", "--status", "QUEUED"))
    assert "at most 2 at a time" in plant.run("job", "explain", "slow", queued, "--json").json["why"]
    assert plant.run("job", "cancel", "slow", "--force", "--reason", "wrong pump").status == 0
    assert plant.run("job", "watch", "slow", "--timeout", "60s").status == 4
    states = {entry["state"] for entry in devices_of(plant, "slow").values()}
    assert states == {"CANCELED"}
    for words_ in (("pause",), ("resume",), ("cancel",)):
        ran = plant.run("job", words_[0], "slow")
        assert (ran.status, "job slow has ended (aborted)" in ran.err) == (6, True)


def test_a_continuous_job_is_joined_by_a_device_that_is_imported_later(plant: Plant) -> None:
    words = ("--operation", "restart", "--tag", "group=r", "--continuous")
    assert plant.run("job", "start", "always", *words).status == 0
    until("six", lambda: plant.run("job", "show", "always", "--json").json["progress"]["succeeded"] == 6)
    assert plant.run("device", "import", plant.folder / "later.jsonl").status == 0
    until("seven", lambda: plant.run("job", "show", "always", "--json").json["progress"]["succeeded"] == 7)
    assert devices_of(plant, "always")[LATER]["state"] == "SUCCEEDED"
    assert any("1 devices: later" in e["text"] for e in plant.run("job", "events", "always", "--json").json["events"])
    assert plant.run("job", "cancel", "always").status == 0
    assert plant.run("job", "watch", "always", "--timeout", "60s").status == 4


def test_a_schedule_is_made_listed_triggered_paused_and_deleted(plant: Plant) -> None:
    spec = plant.folder / "nightly.yaml"
    spec.write_text("name: nightly\noperation: diagnostic\ndiagnostics: [ping]\ntarget: {ids: [r3]}\n")
    cron = ("--cron", "0 2 1 1 *", "--timezone", "Europe/Berlin")
    made = plant.run("job", "schedule", "create", "nightly", spec, *cron, "--json")
    assert made.status == 0, made.err
    again = plant.run("job", "schedule", "create", "nightly", spec, *cron)
    assert (again.status, "exists" in again.err) == (6, True)
    wrong = plant.run("job", "schedule", "create", "other", spec, "--cron", "every day")
    assert (wrong.status, "five fields" in wrong.err) == (2, True)
    assert plant.run("job", "schedule", "trigger", "nightly").status == 0

    def run_of_schedule() -> str | None:
        jobs = plant.run("job", "list", "--json").json["jobs"]
        return next((job["name"] for job in jobs if job["schedule"] == "nightly"), None)

    name = until("its run", run_of_schedule)
    assert name.startswith("nightly-20")
    ran = plant.run("job", "watch", name, "--timeout", "60s", "--json")
    assert ran.status == 0, ran.err
    assert ran.json_lines[-1]["result"]["succeeded"] == 1
    assert plant.run("job", "schedule", "pause", "nightly", "--reason", "holidays").status == 0
    listed = until(
        "paused", lambda: [s for s in plant.run("job", "schedule", "list", "--json").json["schedules"] if s["paused"]]
    )
    assert (listed[0]["cron"], listed[0]["timezone"]) == ("0 2 1 1 *", "Europe/Berlin")
    assert plant.run("job", "schedule", "resume", "nightly").status == 0
    assert plant.run("job", "schedule", "delete", "nightly").status == 0
    assert plant.run("job", "schedule", "trigger", "nightly").status == 2


def test_what_cannot_be_planned_is_refused_and_a_whole_fleet_is_never_meant_by_accident(plant: Plant) -> None:
    ran = plant.run("job", "start", "nobody", "--operation", "restart", "--site", "mars")
    assert (ran.status, "no device" in ran.err) == (6, True)
    ran = plant.run("job", "start", "everything", "--operation", "restart")
    assert (ran.status, "--all" in ran.err) == (2, True)


def test_on_a_terminal_a_job_is_watched_live(plant: Plant) -> None:
    text = on_a_terminal(plant, "job", "watch", "restart-berlin")
    assert "████" in text and "SUCCEEDED" in text
