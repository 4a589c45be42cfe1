"""How two JSON objects differ, as AWS IoT's shadows count it. Pure; what a shadow or a configuration makes of it is theirs.

>>> delta_of({"interval": 5, "led": True}, {"interval": 7, "led": True})
{'interval': 5}
"""

from typing import Any


def delta_of(desired: dict[str, Any], reported: dict[str, Any]) -> dict[str, Any]:
    """Leaves of `desired` that differ from, or are missing in, `reported`; an array that differs is whole."""
    delta: dict[str, Any] = {}
    for key, wanted in desired.items():
        if key not in reported:
            delta[key] = wanted
        elif isinstance(wanted, dict) and isinstance(reported[key], dict):
            if inner := delta_of(wanted, reported[key]):
                delta[key] = inner
        elif not is_same(wanted, reported[key]):
            delta[key] = wanted
    return delta


def is_same(one: Any, other: Any) -> bool:
    """Equal as JSON: 1 is 1.0, and is not true."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def depth_of(value: Any) -> int:
    """How deep arrays and objects are nested: 0 for a scalar.

    >>> depth_of({"a": [1]}), depth_of(3)
    (2, 0)
    """
    if not isinstance(value, dict | list):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth_of, inner), default=0)
