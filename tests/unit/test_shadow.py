"""Shadows: what a merge gives, what differs, what it costs, and that the order of deliveries changes nothing."""

import random
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.differences import delta_of, is_same
from domain.shadow import (
    MAX_SHADOW_BYTES,
    MAX_SHADOW_KEYS,
    Document,
    ShadowRefusedError,
    keys_of,
    merge,
    metadata_for,
    metadata_of,
    size_of,
    without_nulls,
)
from domain.shadow_messages import announce, delta_body, get_body

KEYS = st.sampled_from(["power", "level", "door", "rgb", "timestamp", "a"])
SCALARS = st.booleans() | st.integers(-3, 3) | st.floats(-2, 2, width=16) | st.text("xyö", max_size=2)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=5
)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=4)
PATCHES = st.dictionaries(
    KEYS,
    st.none() | SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(KEYS, st.none() | VALUES, max_size=3),
    max_size=4,
)
UPDATES = st.fixed_dictionaries({}, optional={"desired": st.none() | PATCHES, "reported": st.none() | PATCHES}).filter(
    bool
)


def shape(value: Any) -> Any:
    """A state with every leaf replaced by what its metadata must be."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    return "leaf"


def shape_of_metadata(state: Any, metadata: Any) -> Any:
    """The same of metadata, read by the state it belongs to."""
    if isinstance(state, dict):
        return {key: shape_of_metadata(state[key], inner) for key, inner in metadata.items()}
    if isinstance(state, list):
        assert len(state) == len(metadata)
        return [shape_of_metadata(*pair) for pair in zip(state, metadata, strict=True)]
    assert list(metadata) == ["timestamp"] and isinstance(metadata["timestamp"], int)
    return "leaf"


def has_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(has_null, value.values()))
    return value is None or (isinstance(value, list) and any(map(has_null, value)))


@given(OBJECTS, PATCHES)
def test_merging_is_idempotent_and_leaves_no_null(state: dict[str, Any], patch: dict[str, Any]) -> None:
    before = orjson.dumps([state, patch])
    once, metadata = merge(state, metadata_of(state, 1), patch, 2)
    assert merge(once, metadata, patch, 2) == (once, metadata)
    assert not has_null(once)
    assert orjson.dumps([state, patch]) == before, "what was given is not changed"


@given(OBJECTS, OBJECTS)
def test_what_was_merged_is_there_and_what_was_not_sent_stays(state: dict[str, Any], patch: dict[str, Any]) -> None:
    merged, _ = merge(state, {}, patch, 1)
    assert delta_of(patch, merged) == {}
    assert all(is_same(merged[key], value) for key, value in state.items() if key not in patch)


@given(st.lists(UPDATES, max_size=6))
def test_metadata_has_exactly_the_leaves_of_the_state(updates: list[dict[str, Any]]) -> None:
    document = Document()
    for number, update in enumerate(updates):
        document = document.updated(update, 100.0 + number)
    for state, metadata in (
        (document.desired, document.desired_metadata),
        (document.reported, document.reported_metadata),
    ):
        assert (state is None) == (metadata is None)
        if state is not None:
            assert shape_of_metadata(state, metadata) == shape(state)
    assert document.version == len(updates)
    delta = delta_body(document)
    if delta is not None:
        assert shape_of_metadata(delta["state"], delta["metadata"]) == shape(delta["state"])


@given(OBJECTS, OBJECTS)
def test_the_delta_is_empty_exactly_when_nothing_differs(desired: dict[str, Any], reported: dict[str, Any]) -> None:
    def covered(wanted: Any, have: Any) -> bool:
        if isinstance(wanted, dict) and isinstance(have, dict):
            return all(key in have and covered(value, have[key]) for key, value in wanted.items())
        return is_same(wanted, have)

    delta = delta_of(desired, reported)
    assert (delta == {}) == covered(desired, reported)
    document = Document().updated({"desired": desired, "reported": reported}, 1.0).updated({"reported": delta}, 2.0)
    if covered(desired, document.reported):
        assert document.delta() == {}, "a device that reports the delta is in sync"


@settings(max_examples=60)
@given(st.lists(UPDATES, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_delivery_of_versioned_updates_does_not_matter(
    updates: list[dict[str, Any]], rng: random.Random
) -> None:
    expected = Document()
    for update in updates:
        expected = expected.updated(update, 7.0, expected.version)
    deliveries = [(version, update) for version, update in enumerate(updates)] * 2
    document = Document()
    for _ in updates:  # whoever is refused tries again: each round brings at least one
        rng.shuffle(deliveries)
        for version, update in deliveries:
            try:
                document = document.updated(update, 7.0, version)
            except ShadowRefusedError as refused:
                assert refused.code == 409
    assert document == expected


@given(PATCHES)
def test_what_a_patch_wants_is_what_it_makes_of_nothing(patch: dict[str, Any]) -> None:
    wanted = without_nulls(patch)
    assert Document().updated({"desired": patch}, 1.0).desired == wanted
    assert not has_null(wanted)


def test_values_replace_whole_and_null_deletes_and_a_section_that_is_null_goes() -> None:
    document = Document().updated({"desired": {"a": {"b": 1, "c": [1, 2]}, "d": 4}, "reported": {"x": 1}}, 1.0)
    document = document.updated({"desired": {"a": {"b": None, "c": [3]}, "d": {"e": 5}}}, 2.0)
    assert document.desired == {"a": {"c": [3]}, "d": {"e": 5}} and document.reported == {"x": 1}
    assert document.desired_metadata == {"a": {"c": [{"timestamp": 2}]}, "d": {"e": {"timestamp": 2}}}
    document = document.updated({"desired": None}, 3.0)
    assert (document.desired, document.desired_metadata, document.version) == (None, None, 3)
    assert document.updated({"reported": {"no": {"such": None}}}, 4.0).reported == {"x": 1}
    assert document.updated({"reported": {"empty": {}}}, 4.0).reported == {"x": 1, "empty": {}}


def test_one_is_one_point_zero_and_not_true() -> None:
    document = Document().updated({"desired": {"a": 1, "b": 1, "c": [1, 2]}, "reported": {"a": 1.0, "b": True}}, 1.0)
    assert document.delta() == {"b": 1, "c": [1, 2]}


def test_a_deleted_shadow_is_empty_and_its_version_goes_on() -> None:
    document = Document().updated({"desired": {"a": 1}}, 1.0)
    with pytest.raises(ShadowRefusedError) as refused:
        document.deleted(5)
    assert refused.value.code == 409
    gone = document.deleted(1)
    assert (gone.version, gone.exists, gone.state()) == (1, False, {})
    assert gone.updated({"reported": {"b": 2}}, 2.0).version == 2


def test_an_update_of_another_version_is_refused_with_awss_words() -> None:
    with pytest.raises(ShadowRefusedError, match=r"^Version conflict$"):
        Document().updated({"desired": {}}, 1.0, 1)
    assert Document().updated({"desired": {}}, 1.0, 0).version == 1


@pytest.mark.parametrize(("more", "code"), [(-1, None), (0, None), (1, 413)])
@pytest.mark.parametrize("section", ["desired", "reported"])
def test_the_size_of_both_sections_is_judged_after_the_merge(section: str, more: int, code: int | None) -> None:
    other = "reported" if section == "desired" else "desired"
    half = {"a": "x" * 4000}
    document = Document().updated({other: half}, 1.0)
    rest = MAX_SHADOW_BYTES - size_of(document) - len(b'{"b":""}') + more
    patch = {section: {"b": "y" * rest}}
    assert len(orjson.dumps(patch)) < MAX_SHADOW_BYTES, "the update by itself is a legal one"
    _accepted_or(document, patch, code)
    if code is None:
        assert size_of(document.updated(patch, 2.0)) == MAX_SHADOW_BYTES + more


def nested(levels: int) -> dict[str, Any]:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize(("levels", "code"), [(7, None), (8, None), (9, 400)])
def test_a_section_is_at_most_eight_levels_deep(levels: int, code: int | None) -> None:
    _accepted_or(Document(), {"reported": nested(levels)}, code)


@pytest.mark.parametrize(("more", "code"), [(-1, None), (0, None), (1, 400)])
def test_a_section_has_at_most_so_many_keys_after_the_merge(more: int, code: int | None) -> None:
    document = Document().updated({"reported": {f"a{n}": n for n in range(100)}}, 1.0)
    patch = {"reported": {f"b{n}": n for n in range(MAX_SHADOW_KEYS - 100 + more)}}
    assert keys_of(patch["reported"]) <= MAX_SHADOW_KEYS
    _accepted_or(document, patch, code)


def _accepted_or(document: Document, patch: dict[str, Any], code: int | None) -> None:
    if code is None:
        assert document.updated(patch, 2.0).version == document.version + 1
        return
    with pytest.raises(ShadowRefusedError) as refused:
        document.updated(patch, 2.0)
    assert refused.value.code == code


def test_an_update_is_announced_in_the_order_delta_documents_accepted_each_with_the_token() -> None:
    before = Document().updated({"reported": {"power": "off"}}, 100.9)
    patch = {"desired": {"power": "on", "gone": None}}
    after = before.updated(patch, 200.9)
    messages = announce("motor-7", "door", before, after, patch, 200.9, "t-1")
    stem = "$aws/things/motor-7/shadow/name/door/update"
    assert [topic for topic, _ in messages] == [f"{stem}/delta", f"{stem}/documents", f"{stem}/accepted"]
    delta, documents, accepted = (orjson.loads(payload) for _, payload in messages)
    wanted = {"power": {"timestamp": 200}}
    common = {"timestamp": 200, "clientToken": "t-1"}
    assert delta == {"version": 2, "state": {"power": "on"}, "metadata": wanted, **common}
    assert accepted == {"version": 2, "state": patch, "metadata": {"desired": wanted}, **common}
    reported = {"state": {"power": "off"}, "metadata": {"power": {"timestamp": 100}}}
    assert documents["previous"] == {
        "version": 1,
        "state": {"reported": reported["state"]},
        "metadata": {"reported": reported["metadata"]},
    }
    assert documents["current"]["state"] == {"desired": {"power": "on"}, "reported": {"power": "off"}}
    assert get_body(after)["state"]["delta"] == {"power": "on"}


def test_without_a_difference_there_is_no_delta() -> None:
    before = Document().updated({"desired": {"power": "on"}}, 1.0)
    patch = {"reported": {"power": "on"}}
    topics = [topic for topic, _ in announce("m", "", before, before.updated(patch, 2.0), patch, 2.0)]
    assert topics == ["$aws/things/m/shadow/update/documents", "$aws/things/m/shadow/update/accepted"]


def test_metadata_of_a_delta_takes_arrays_and_replaced_objects_whole() -> None:
    metadata = {"rgb": [{"timestamp": 1}], "door": {"open": {"timestamp": 2}, "lock": {"timestamp": 3}}}
    assert metadata_for({"rgb": [1], "door": {"open": True}}, metadata) == {
        "rgb": [{"timestamp": 1}],
        "door": {"open": {"timestamp": 2}},
    }
