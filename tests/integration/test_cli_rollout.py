"""`rollout` against a whole running stack and a simulated fleet: what is started, shown and steered, and how it exits."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

import cli.steering
from tests.integration.plant_setup import ROOT, Plant, fleet_of, on_a_terminal, running

GROUPS, GROUP_SIZE = ("a", "b", "c", "d", "e", "f", "g"), 8
OLD, NEW, BAD = b"old" * 1000, b"new" * 1000, b"bad" * 1000


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    with running(tmp_path_factory.mktemp("plant")) as made:
        _furnish(made)
        with fleet_of(made, *_FLEET):
            yield made


_FLEET = (
    "--simulate",
    *("--base-version", "1.2.0", "--product", "motor-controller"),
    *("--fault", "version=1.3.0-bad,fail=100%"),
)


def _furnish(plant: Plant) -> None:
    """Devices, a key, releases."""
    lines = []
    for group in GROUPS:
        for number in range(GROUP_SIZE):
            name = f"{group}{number}"
            lines.append({"device_id": name, "device_type": "motor", "serial_number": f"S{name}", "site_id": "berlin",
                          "tags": {"group": group}, "firmware_version": "1.2.0"})  # fmt: skip
    (plant.folder / "fleet.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert plant.run("device", "import", plant.folder / "fleet.jsonl").status == 0
    assert plant.run("release", "keygen", "--out", plant.folder / "release").status == 0
    for version, image in (("1.2.0", OLD), ("1.3.0", NEW), ("1.3.0-bad", BAD)):
        path = plant.folder / f"{version}.bin"
        path.write_bytes(image)
        words = ("--product", "motor-controller", "--hardware", "motor", "--version", version)
        assert plant.run("release", "publish", path, *words, "--key", plant.folder / "release.key").status == 0


def test_a_good_release_reaches_the_fleet_and_the_exit_status_says_so(plant: Plant) -> None:
    ran = plant.run("rollout", "start", plant.spec("good", "a"), "--wait", "--json", "--timeout", "60s")
    assert ran.status == 0, ran.err
    first, *middle, last = ran.json_lines
    assert (first["workflow_id"], first["devices"]) == ("rollout:good", 8)
    assert first["ui_url"].endswith("/namespaces/default/workflows/rollout%3Agood")
    assert [wave["devices"] for wave in first["waves"]] == [2, 6]
    assert {"event", "at"} >= {next(iter(line)) for line in middle}
    assert {"outcome": "succeeded", "succeeded": 8, "failed": 0, "exit_status": 0}.items() <= last["result"].items()
    shown = plant.run("rollout", "show", "good", "--json").json
    assert (shown["outcome"], shown["release"]) == ("succeeded", "motor-controller@1.3.0")
    assert "SUCCEEDED" in plant.run("rollout", "show", "good").out
    assert "good" in [found["name"] for found in plant.run("rollout", "list", "--json").json["rollouts"]]
    events = plant.run("rollout", "events", "good", "--json").json["events"]
    assert [event["event_no"] for event in events] == sorted(event["event_no"] for event in events)
    assert "confirmed by the device itself" in plant.run("rollout", "device", "good", "a3", "--json").json["why"]
    assert len(plant.run("rollout", "devices", "good", "--status", "SUCCEEDED", "--json").json["devices"]) == 8
    outside = plant.run("rollout", "device", "good", "b1")
    assert (outside.status, "does not match the target" in outside.err) == (2, True)


def test_a_bad_release_is_halted_with_status_3(plant: Plant) -> None:
    ran = plant.run("rollout", "start", plant.spec("bad", "b", "1.3.0-bad"), "--wait", "--timeout", "60s")
    assert ran.status == 3, ran.err
    assert "rollout bad halted: halt:" in ran.err
    assert plant.run("rollout", "watch", "bad").status == 3
    failed = plant.run("rollout", "devices", "bad", "--status", "FAILED")
    assert failed.err.strip() == "2 devices"
    deadline = time.monotonic() + 60
    while (cause := plant.run("rollout", "show", "bad", "--json").json["causes"][0])["diagnosed"] < 2:
        assert time.monotonic() < deadline, cause
        time.sleep(0.2)
    assert (cause["failure_class"], cause["count"], cause["share"]) == ("flash", 2, 1.0)
    assert "% of memory free" in cause["said"] and "its log ends" in cause["said"]
    shown = plant.run("rollout", "show", "bad", "--device", cause["example"])
    assert "its log-tail" in shown.out and f"starter.py diagnose {cause['example']}" in shown.out
    assert plant.run("diagnose", cause["example"], "ping").status == 0


def test_a_rollout_that_waits_for_approval_is_left_with_status_5_and_steered(plant: Plant) -> None:
    spec = plant.spec("steered", "c", approval="every-wave", pace={"in_flight": 1, "per_minute": None})
    ran = plant.run("rollout", "start", spec, "--wait")
    assert ran.status == 5
    assert "rollout steered waits for a person (waiting-approval)" in ran.err
    assert "'rollout approve steered'" in ran.err
    refused = plant.run("rollout", "promote", "steered", "--json")
    assert (refused.status, refused.json["error"]["kind"]) == (6, "RefusedError")
    assert "cannot promote" in refused.err
    assert plant.run("rollout", "pause", "steered", "--reason", "cleaning", "--json").json["phase"] == "paused"
    assert "paused" in plant.run("rollout", "device", "steered", "c1", "--json").json["why"]
    assert plant.run("rollout", "adjust", "steered", "--in-flight", "4", "--per-minute", "none").status == 0
    assert plant.run("rollout", "resume", "steered").status == 0
    assert plant.run("rollout", "approve", "steered", "--reason", "looks good").status == 0
    assert plant.run("rollout", "watch", "steered", "--leave", "--timeout", "30s").status == 5
    assert plant.run("rollout", "approve", "steered").status == 0
    assert plant.run("rollout", "watch", "steered", "--stay", "--timeout", "30s").status == 0
    said = " ".join(event["text"] for event in plant.run("rollout", "events", "steered", "--json").json["events"])
    assert "anna: cleaning" in said
    assert "anna: looks good" in said


def test_an_aborted_rollout_ends_with_status_4_and_takes_no_more_orders(plant: Plant) -> None:
    assert plant.run("rollout", "start", plant.spec("aborted", "d", approval="start")).status == 0
    assert plant.run("rollout", "abort", "aborted", "--reason", "wrong image").status == 0
    assert plant.run("rollout", "watch", "aborted", "--timeout", "30s").status == 4
    for words in (("pause",), ("resume",), ("approve",), ("promote",), ("abort",), ("adjust", "--in-flight", "2")):
        ran = plant.run("rollout", words[0], "aborted", *words[1:])
        assert (ran.status, "rollout aborted has ended (aborted)" in ran.err) == (6, True)


def test_a_name_is_never_used_twice(plant: Plant) -> None:
    spec = plant.spec("named", "d", approval="start")
    assert plant.run("rollout", "start", spec).status == 0
    running = plant.run("rollout", "start", spec)
    assert (running.status, "it is running already" in running.err) == (6, True)
    plant.run("rollout", "abort", "named")
    assert plant.run("rollout", "watch", "named", "--timeout", "30s").status == 4
    ended = plant.run("rollout", "start", spec)
    assert (ended.status, "a rollout of this name has ended (aborted" in ended.err) == (6, True)


@pytest.mark.parametrize("wait", [[], ["--wait"]])
def test_what_cannot_be_planned_is_refused_with_the_reason(plant: Plant, wait: list[str]) -> None:
    name = f"refused{len(wait)}"
    cases = (("e", "9.9.9", "no release motor-controller@9.9.9"), ("nobody", "1.3.0", "no device matches the target"))
    for group, version, words in cases:
        ran = plant.run("rollout", "start", plant.spec(name, group, version), *wait)
        assert "no plan within" not in ran.err
        assert (ran.status, words in ran.err) == (6, True), ran.err
    assert plant.run("rollout", "watch", name).status == 6
    assert "nobody" not in plant.run("rollout", "list").out
    assert plant.run("rollout", "start", plant.spec(name, "e", approval="start")).status == 0
    assert plant.run("rollout", "abort", name).status == 0
    assert plant.run("rollout", "watch", name, "--timeout", "30s").status == 4


def test_two_rollouts_do_not_touch_the_same_devices(plant: Plant) -> None:
    assert plant.run("rollout", "start", plant.spec("first", "f", approval="start")).status == 0
    second = plant.run("rollout", "start", plant.spec("second", "f"))
    assert second.status == 6
    assert "8 of its 8 devices are held by rollout first" in second.err
    assert plant.run("rollout", "watch", "first", "--stay", "--timeout", "1s").status == 5
    assert plant.run("rollout", "abort", "first").status == 0


def test_without_a_worker_a_rollout_is_still_shown_and_orders_say_that_nobody_takes_them(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.steering, "ANSWER_SECONDS", 1.0)
    assert plant.run("rollout", "start", plant.spec("orphan", "g", approval="start")).status == 0
    worker = plant.worker()
    worker.suspend()
    try:
        ran = plant.run("rollout", "pause", "orphan")
        shown = plant.run("rollout", "show", "orphan", "--json")
    finally:
        worker.resume()
    assert (ran.status, "no worker has taken the request" in ran.err) == (1, True)
    assert (shown.status, shown.json["devices"]) == (0, 8)
    assert plant.run("rollout", "abort", "orphan").status == 0


def test_on_a_terminal_a_rollout_is_watched_live(plant: Plant) -> None:
    """`watch` as a person has it: bars that are drawn over, until the end."""
    text = on_a_terminal(plant, "rollout", "watch", "good")
    assert "\x1b[32m" in text  # green
    assert "████" in text
    assert "SUCCEEDED" in text


def test_no_rollout_of_a_name_is_an_error_everywhere(plant: Plant) -> None:
    for words in (("watch",), ("show",), ("pause",), ("abort",), ("events",), ("devices",)):
        ran = plant.run("rollout", words[0], "nobody")
        assert (ran.status, "no rollout 'nobody'" in ran.err) == (2, True), ran.err


def test_a_database_that_is_away_is_waited_for_and_ctrl_c_ends_the_watching_alone(plant: Plant) -> None:
    assert plant.run("rollout", "start", plant.spec("away", "g", approval="start")).status == 0
    command = [sys.executable, "starter.py", "rollout", "watch", "away", "--stay"]
    environment = {**os.environ, **plant.environment}
    watching = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert watching.stdout is not None
    lines = iter(watching.stdout.readline, "")
    assert any("waits: approval of wave 1" in line for line in lines)
    [pid_file] = (plant.folder / "state").rglob("postmaster.pid")
    postmaster = psutil.Process(int(pid_file.read_text().split()[0]))
    database = [postmaster, *postmaster.children(recursive=True)]
    for process in database:
        process.suspend()
    try:
        assert any("PostgreSQL does not answer; what is shown is old" in line for line in lines)
    finally:
        for process in database:
            process.resume()
    assert any("waits: approval of wave 1" in line for line in lines)
    watching.send_signal(signal.SIGINT)
    _, errors = watching.communicate(timeout=20)
    assert watching.returncode == 130
    assert "interrupted; a rollout that was started goes on" in errors
    assert plant.run("rollout", "show", "away", "--json").json["phase"] == "waiting-approval"
