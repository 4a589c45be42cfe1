"""What a report changes, and what is left to do."""

from typing import Any

import pytest

from domain.configurations import ConfigReport, ConfigState, DeviceConfig, delta_message
from domain.differences import delta_of, depth_of, is_same


def config(desired: dict[str, Any] | None = None, version: int = 0, **more: Any) -> DeviceConfig:
    return DeviceConfig("motor-7", desired, version, {}, 0, 1, **more)


@pytest.mark.parametrize(
    ("report", "state"),
    [
        (ConfigReport(2), ConfigState.IN_SYNC),
        (ConfigReport(2, {"interval": 5}), ConfigState.IN_SYNC),
        (ConfigReport(2, {"interval": 5.0}), ConfigState.IN_SYNC),
        (ConfigReport(2, {"interval": 6}), ConfigState.DRIFTED),
        (ConfigReport(2, {}), ConfigState.DRIFTED),
        (ConfigReport(1), ConfigState.PENDING),
        (ConfigReport(3), ConfigState.DRIFTED),
    ],
)
def test_a_report_puts_the_device_somewhere(report: ConfigReport, state: ConfigState) -> None:
    device = config({"interval": 5}, 2, versions={1: {"interval": 9}})
    assert device.state is ConfigState.PENDING
    device.report(report, 1000.0)
    assert device.state is state and device.document_version == 2
    assert (delta_message(device, 1000.0) is None) == (state is ConfigState.IN_SYNC)


def test_a_device_that_goes_back_to_an_earlier_version_has_drifted() -> None:
    device = config({"interval": 5}, 2, versions={1: {"interval": 9}})
    device.report(ConfigReport(2), 1.0)
    device.report(ConfigReport(1), 2.0)
    assert device.state is ConfigState.DRIFTED and device.confirmed == {1, 2}
    assert device.delta() == {"version": 2, "config": {"interval": 5}}


def test_a_version_that_never_was_wanted_confirms_nothing() -> None:
    device = config({"interval": 5}, 2)
    device.report(ConfigReport(1_000_000, {"interval": 5}), 1.0)
    assert device.confirmed == set() and device.state is ConfigState.DRIFTED


def test_the_delta_is_the_leaves_that_differ_and_arrays_whole() -> None:
    desired = {"a": 1, "b": {"c": 2, "d": 3}, "list": [1, 2], "same": None}
    reported = {"a": True, "b": {"c": 2, "d": 4}, "list": [1], "same": None, "more": 1}
    assert delta_of(desired, reported) == {"a": 1, "b": {"d": 3}, "list": [1, 2]}
    assert delta_of(desired, desired) == {}


def test_json_compares_as_json_and_depth_counts_levels() -> None:
    assert is_same({"a": [1, {"b": 1.0}]}, {"a": [1.0, {"b": 1}]})
    assert not is_same(1, True) and not is_same({"a": 1}, {"a": 1, "b": 2}) and not is_same([1], [1, 1])
    assert [depth_of(x) for x in (1, {}, [[]], {"a": {"b": []}})] == [0, 1, 2, 3]
