"""The benchmark of provisioning, small: real devices with keys of their own, on the whole stack, and what they cost."""

import io

from rich.console import Console

from bench.provisioning import ProvisioningConfig, is_right, run, show


async def test_a_few_newcomers_become_active_and_what_they_cost_is_measured() -> None:
    figures = await run(ProvisioningConfig(devices=5, at_once=4, processes=2))
    assert is_right(figures), figures
    assert figures["devices_per_second"] > 0
    costs = figures["cpu_seconds_per_1000"]
    assert {"postgresql", "temporal", "broker", "worker", "gateway", "enrolment", "clients"} <= set(costs)
    assert all(costs[name] > 0 for name in ("temporal", "worker", "enrolment", "clients"))
    assert 5 < figures["history_events_per_device"] < 100
    assert set(figures["clients"]["p50_seconds"]) == {"enrol", "connect", "configure"}
    out = io.StringIO()
    show(Console(file=out, width=120), figures)
    assert "history_events_per_device" in out.getvalue()
    assert "not every device" not in out.getvalue()


def test_a_device_that_did_not_get_through_is_said() -> None:
    figures = {"devices": 2, "states": {"active": 1, "error": 1}, "clients": {"gave_up": 0}}
    assert not is_right(figures)
    assert not is_right({"devices": 2, "states": {"active": 2}, "clients": {"gave_up": 1}})
    assert is_right({"devices": 2, "states": {"active": 2}, "clients": {"gave_up": 0}})
