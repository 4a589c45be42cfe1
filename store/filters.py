"""A `DeviceFilter` as a WHERE clause, with bound parameters only.

No text of a filter ever becomes SQL: keys, values and lists are parameters, operators come from a fixed table. The
meaning is domain/selector.py's. Exact tags use the GIN index through `@>`; text is compared in code-point order
(`COLLATE "C"`), so that the answer does not depend on the server's locale.

>>> sql, params = where(DeviceFilter(type="motor"))
>>> sql
'd.status <> %(filter_retired)s AND d.device_type = %(filter_type)s'
>>> params
{'filter_retired': 'retired', 'filter_type': 'motor'}
"""

from datetime import datetime, timedelta
from typing import Any

from psycopg.types.json import Jsonb

from domain.selector import Operator, check_askable, tag_conditions
from models.device import DeviceFilter, DeviceStatus

_COMPARISONS: dict[Operator, str] = {"<": "<", "<=": "<=", ">": ">", ">=": ">=", "!=": "<>"}


def where(devices: DeviceFilter, now: datetime | None = None) -> tuple[str, dict[str, Any]]:
    """The condition that selects these devices, over `devices d`, and its parameters.

    Args:
        devices: what to select.
        now: the instant that inactivity is measured from; the database's `now()` when None.

    Returns:
        SQL that is never empty and can stand after WHERE or AND, with psycopg's named parameters; their names all
        begin with `filter_`, so that they can be merged with those of the statement around it.

    Raises:
        InvalidInputError: a filter that PostgreSQL cannot be asked.
    """
    check_askable(devices)
    clauses: list[str] = []
    params: dict[str, Any] = {}

    def add(clause: str, **values: Any) -> None:
        clauses.append(clause)
        params.update(values)

    if devices.statuses:
        add("d.status = ANY(%(filter_statuses)s::text[])", filter_statuses=[str(s) for s in devices.statuses])
    else:
        add("d.status <> %(filter_retired)s", filter_retired=str(DeviceStatus.RETIRED))
    if devices.type is not None:
        add("d.device_type = %(filter_type)s", filter_type=devices.type)
    if devices.sites:
        add("d.site_id = ANY(%(filter_sites)s::text[])", filter_sites=list(devices.sites))
    if devices.versions:
        add("d.firmware_version = ANY(%(filter_versions)s::text[])", filter_versions=list(devices.versions))
    if devices.ids:
        add("d.device_id = ANY(%(filter_ids)s::text[])", filter_ids=list(devices.ids))
    for clause, values in _tag_clauses(devices):
        add(clause, **values)
    if devices.inactive_minutes is not None:
        add(
            "NOT EXISTS (SELECT FROM presence p WHERE p.device_id = d.device_id"
            " AND p.last_heartbeat > COALESCE(%(filter_now)s::timestamptz, now()) - %(filter_inactive)s::interval)",
            filter_now=now,
            filter_inactive=timedelta(minutes=devices.inactive_minutes),
        )
    return " AND ".join(clauses), params


def _tag_clauses(devices: DeviceFilter) -> list[tuple[str, dict[str, Any]]]:
    conditions = tag_conditions(devices)
    exact = {key: condition.value for key, condition in conditions.items() if condition.operator == "="}
    found: list[tuple[str, dict[str, Any]]] = []
    if exact:
        found.append(("d.tags @> %(filter_tags)s::jsonb", {"filter_tags": Jsonb(exact)}))
    compared = [(key, condition) for key, condition in conditions.items() if condition.operator != "="]
    for i, (key, condition) in enumerate(compared):
        value = f'(d.tags ->> %(filter_key_{i})s::text) COLLATE "C"'
        clause = f"{value} {_COMPARISONS[condition.operator]} %(filter_value_{i})s::text"
        found.append((clause, {f"filter_key_{i}": key, f"filter_value_{i}": condition.value}))
    return found
