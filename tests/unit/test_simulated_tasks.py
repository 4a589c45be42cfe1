"""The simulated device verifies tasks as the agent does, and models what they bring about."""

from typing import Any

import orjson
import pytest

from agent.faults import Fate, FaultPlan, FaultRule
from agent.simulated import ModelSlots, Rhythm, SimulatedDevice, Stage
from tests.agent_standin import StandInJobs
from tests.task_standin import Tasked, TaskPublisher, queue_task

THING, JOB = "motor-7", "_job"
PUBLISHER = TaskPublisher()


class Bench:
    """One simulated device with its server; messages are delivered on the spot, in the order they were sent."""

    def __init__(self, plan: FaultPlan | None = None) -> None:
        self.jobs = StandInJobs(PUBLISHER)
        self.answers: list[dict[str, Any]] = []
        self.sent: list[tuple[str, bytes]] = []
        fate = (plan or FaultPlan()).fate
        slots = ModelSlots("1.2.0", "0" * 64)
        self.device = SimulatedDevice(
            THING, "motor", PUBLISHER.keys, slots, fate, lambda *message: self.sent.append(message), Rhythm()
        )

    def run(self, task: Tasked, attempts: int = 1) -> Any:
        job = queue_task(self.jobs, THING, JOB, task, attempts)
        for _ in range(attempts):
            self.device.stage = Stage.IDLE
            self.device.ask()
            while self.sent:
                topic, payload = self.sent.pop(0)
                body = orjson.loads(payload)
                if topic.endswith("/diagnostics/response"):
                    self.answers.append(body)
                    continue
                parts = topic.split("/")[4:]
                kind, answer = self.jobs.answer(THING, parts[0] if len(parts) == 2 else None, parts[-1], body)
                answer |= {"clientToken": body["clientToken"]}
                self.device.receive(f"{topic}/{kind}", memoryview(orjson.dumps(answer)))
        return job


def test_a_restart_counts_a_boot_and_reports_it_after_the_reboot() -> None:
    bench = Bench()
    assert bench.run(Tasked("restart")).status == "SUCCEEDED"
    assert bench.device.boots == 2
    assert [details.get("step") or details["bootId"] for _, _, details in bench.jobs.log] == ["rebooting", f"{2:016x}"]


def test_config_sync_diagnostic_and_custom_succeed_with_what_their_orders_name() -> None:
    assert Bench().run(Tasked("config-sync", {"configVersion": 7})).details == {"configVersion": "7"}
    assert Bench().run(Tasked("custom", {"do": "it"})).status == "SUCCEEDED"
    bench = Bench()
    asked = {"requests": [{"requestId": "a" * 32, "type": "ping"}]}
    assert bench.run(Tasked("diagnostic", asked)).details == {"answered": "1"}
    assert bench.answers[0]["requestId"] == "a" * 32 and bench.answers[0]["pong"] is True


def test_an_order_for_another_device_is_refused_as_by_the_real_agent() -> None:
    job = Bench().run(Tasked("restart", order={"device_id": "motor-8"}))
    assert (job.status, job.details["failure"]) == ("FAILED", "verify")


def test_an_attempt_that_has_ended_is_not_done_again() -> None:
    bench = Bench()
    bench.run(Tasked("restart"))
    assert bench.run(Tasked("restart")).details["failure"] == "verify"
    assert bench.device.boots == 2


@pytest.mark.parametrize(("fault", "failure"), [("fail", "internal"), ("crash", "power"), ("no-confirm", "network")])
def test_a_job_is_failed_by_its_job_id_with_a_class_for_each_fault(fault: str, failure: str) -> None:
    plan = FaultPlan(1, (FaultRule.parse(f"version={JOB},{fault}=100%"),))
    job = Bench(plan).run(Tasked("custom"))
    assert (job.status, job.details["failure"]) == ("FAILED", failure)


def test_every_attempt_is_drawn_anew() -> None:
    plan = FaultPlan(1, (FaultRule.parse("fail=50%"),))
    drawn = {plan.fate(THING, f"{JOB}:{attempt}") for attempt in range(1, 20)}
    assert drawn == {Fate.FAIL, Fate.HEALTHY}


def test_a_silent_device_is_heard_of_no_more() -> None:
    bench = Bench(FaultPlan(1, (FaultRule.parse("silent=100%"),)))
    assert bench.run(Tasked("restart")).status == "IN_PROGRESS"
    assert bench.device.stage is Stage.HUSHED and bench.device.due is None
