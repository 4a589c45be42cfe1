"""What a device does with AWS IoT's shadows and jobs, once for all judges: any SDK has to come through it as on AWS."""

from typing import Any

from models.protocol import NEXT_JOB, Verb
from tests.integration.rollout_setup import NEW
from tests.sdk.judge import Judge
from tests.sdk.site import JOB

DONE = {"status": "SUCCEEDED", "statusDetails": {"version": "1.3.0", "sha256": NEW, "slot": "b"}}


def update(**more: Any) -> dict[str, Any]:
    """An update of an execution with which the device is still busy."""
    return {"status": "IN_PROGRESS", **more}


def work_through_a_job(judge: Judge, offer: Any) -> None:
    """From the first hint to the end, with what a device can do wrong on its way. `offer` has the server hint at the job."""
    pending = judge.ask(Verb.GET_PENDING)
    assert pending.accepted and [job["jobId"] for job in pending.body["queuedJobs"]] == [JOB]
    assert pending.body.get("inProgressJobs", []) == []
    offer()
    assert [job["jobId"] for job in judge.events.next("notify")["jobs"]["QUEUED"]] == [JOB]
    hinted = judge.events.next("notify-next")["execution"]
    assert (hinted["jobId"], hinted["status"], hinted["thingName"]) == (JOB, "QUEUED", judge.thing)

    first = judge.ask(Verb.DESCRIBE, job=NEXT_JOB).body["execution"]
    assert (first["jobId"], first["status"], first["versionNumber"]) == (JOB, "QUEUED", 1)
    assert first["jobDocument"]["operation"] == "firmware-update"
    assert judge.ask(Verb.UPDATE, DONE, job=JOB).code == "InvalidStateTransition"
    assert judge.ask(Verb.UPDATE, update(), job="no-such-job").code == "ResourceNotFound"
    assert judge.ask(Verb.DESCRIBE, job="no-such-job").code == "ResourceNotFound"

    started = judge.ask(Verb.START_NEXT, {"statusDetails": {"step": "accepted"}}).body["execution"]
    assert (started["jobId"], started["status"], started["versionNumber"]) == (JOB, "IN_PROGRESS", 2)
    assert {"release", "order"} <= started["jobDocument"].keys()
    wrong = judge.ask(Verb.UPDATE, update(expectedVersion=7), job=JOB)
    assert wrong.code == "VersionMismatch" and wrong.body["executionState"]["versionNumber"] == 2
    going_on = judge.ask(
        Verb.UPDATE,
        update(
            statusDetails={"step": "confirming"},
            expectedVersion=2,
            executionNumber=1,
            includeJobExecutionState=True,
            includeJobDocument=True,
        ),
        job=JOB,
    )
    assert going_on.accepted and going_on.body["executionState"]["versionNumber"] == 3
    assert going_on.body["executionState"]["statusDetails"] == {"step": "confirming"}
    assert going_on.body["jobDocument"]["version"] == "1.3.0"
    described = judge.ask(Verb.DESCRIBE, job=JOB).body["execution"]
    assert (described["versionNumber"], described["statusDetails"]) == (3, {"step": "confirming"})

    assert judge.ask(Verb.UPDATE, DONE, job=JOB).accepted
    assert judge.events.next("notify")["jobs"] == {}
    assert "execution" not in judge.events.next("notify-next")
    assert judge.ask(Verb.UPDATE, DONE, job=JOB).code == "TerminalStateReached"
    assert "execution" not in judge.ask(Verb.START_NEXT).body
    assert judge.ask(Verb.GET_PENDING).body["queuedJobs"] == []


def live_with_a_shadow(judge: Judge, shadow: str = "") -> None:
    """From no shadow through wishes, reports and mistakes to no shadow again."""

    def say(**body: Any) -> Any:
        return judge.ask(Verb.SHADOW_UPDATE, body, shadow=shadow)

    none = judge.ask(Verb.SHADOW_GET, shadow=shadow)
    name = judge.thing + (f"~{shadow}" if shadow else "")
    assert none.code == 404 and none.body["message"] == f"No shadow exists with name: {name}"

    wish = say(state={"desired": {"colour": "red", "level": {"low": 1, "high": 9}}})
    assert wish.accepted and wish.body["version"] == 1
    assert wish.body["state"] == {"desired": {"colour": "red", "level": {"low": 1, "high": 9}}}
    delta = judge.events.next("delta", shadow)
    assert delta["state"] == {"colour": "red", "level": {"low": 1, "high": 9}} and delta["version"] == 1
    changed = judge.events.next("documents", shadow)
    assert changed["current"]["version"] == 1
    assert changed["current"]["state"]["desired"]["colour"] == "red"

    expected = {"version": 1} if judge.names_versions else {}
    report = say(state={"reported": {"colour": "red", "level": {"low": 1}}}, **expected)
    assert report.accepted and report.body["version"] == 2
    assert judge.events.next("delta", shadow)["state"] == {"level": {"high": 9}}
    changed = judge.events.next("documents", shadow)
    assert (changed["previous"]["version"], changed["current"]["version"]) == (1, 2)

    whole = judge.ask(Verb.SHADOW_GET, shadow=shadow)
    assert whole.accepted and whole.body["version"] == 2
    assert whole.body["state"] == {
        "desired": {"colour": "red", "level": {"low": 1, "high": 9}},
        "reported": {"colour": "red", "level": {"low": 1}},
        "delta": {"level": {"high": 9}},
    }
    assert whole.body["metadata"]["desired"]["colour"]["timestamp"] >= 1_700_000_000

    if judge.names_versions:
        assert say(state={"reported": {"colour": "blue"}}, version=1).code == 409
    assert say(state={"desired": {"text": "x" * 9_000}}).code == 413
    deep: dict[str, Any] = {"end": 1}
    for _ in range(9):
        deep = {"down": deep}
    assert say(state={"desired": deep}).code == 400
    agreed = say(state={"reported": {"level": {"high": 9}}})
    assert agreed.accepted and agreed.body["version"] == 3, "what was rejected has changed nothing"
    assert judge.events.next("documents", shadow)["current"]["version"] == 3
    assert judge.events.none("delta", shadow), "nothing differs any more"

    dropped = say(state={"desired": None})
    assert dropped.accepted and dropped.body["version"] == 4
    assert "desired" not in judge.ask(Verb.SHADOW_GET, shadow=shadow).body["state"]

    gone = judge.ask(Verb.SHADOW_DELETE, shadow=shadow)
    assert gone.accepted and gone.body["version"] >= 4
    assert judge.ask(Verb.SHADOW_GET, shadow=shadow).code == 404
    assert judge.ask(Verb.SHADOW_DELETE, shadow=shadow).code == 404
