"""Reading specifications: every mistake at once, each with its line; hostile YAML refused in a sentence."""

import time
from fractions import Fraction
from pathlib import Path

import pytest

from cli.spec import MAX_SPEC_BYTES, load_spec, parse_spec
from models.errors import InvalidInputError, NotFoundError, SpecError
from models.spec import Approval, RolloutSpec

GOOD = """\
name: motor-1.3.0
release: motor-controller@1.3.0
target: {type: motor, tags: {environment: production}}     # also sites, statuses, versions, ids
waves:
  - {name: canary, size: 5%, soak: 4h}
  - {name: early, size: 25%, soak: 4h}
  - {name: fleet, size: 100%}
gate: {healthy: 2%, limit: 10%, false_halt: 0.1%, missed_halt: 1%}
completion: 95%
deadlines: {accept: 24h, download: 2h, install: 30m, confirm: 15m}
pace: {in_flight: 500, per_minute: 1000}
approval: none
"""


def mistakes(text: str | bytes) -> list[tuple[int | None, str]]:
    """Line and path of every mistake of a specification."""
    with pytest.raises(SpecError) as refused:
        parse_spec(text.encode() if isinstance(text, str) else text, "spec.yaml")
    return [(mistake.line, mistake.path) for mistake in refused.value.mistakes]


def messages(text: str | bytes) -> str:
    """The whole message about a specification."""
    with pytest.raises(SpecError) as refused:
        parse_spec(text.encode() if isinstance(text, str) else text, "spec.yaml")
    return str(refused.value)


def test_the_specification_of_the_documentation_is_read() -> None:
    spec = parse_spec(GOOD.encode(), "spec.yaml")
    assert [(wave.name, wave.size) for wave in spec.waves] == [
        ("canary", Fraction(1, 20)),
        ("early", Fraction(1, 4)),
        ("fleet", Fraction(1)),
    ]
    assert spec.approval is Approval.NONE


def test_its_values_are_the_defaults() -> None:
    short = "\n".join(line for line in GOOD.splitlines() if line.split(":")[0] in ("name", "release", "target"))
    waves = (
        "\nwaves: [{name: canary, size: 5%, soak: 4h}, {name: early, size: 25%, soak: 4h}, {name: fleet, size: 100%}]"
    )
    assert parse_spec((short + waves).encode(), "a") == parse_spec(GOOD.encode(), "b")


@pytest.mark.parametrize("text", [b"\xef\xbb\xbf" + GOOD.encode(), GOOD.replace("\n", "\r\n").encode()])
def test_byte_order_marks_and_windows_line_ends_are_taken(text: bytes) -> None:
    assert parse_spec(text, "a") == parse_spec(GOOD.encode(), "b")


def test_every_mistake_is_told_at_once_with_its_line() -> None:
    text = """\
name: motor 1.3.0
release: motor-controller
target: {type: motor, site: [berlin]}
waves:
  - {name: canary, size: 50%, soak: 4 hours}
  - name: early
    size: 25%
    sok: 4h
  - {name: fleet}
gate:
  healthy: 20%
  limit: 10%
  fals_halt: 1%
completion: 95
deadlines: {accept: 0s, download: 2 h}
pace: {in_flight: 0, per_minute: many}
approval: maybe
"""
    assert mistakes(text) == [
        (1, "name"),
        (2, "release"),
        (3, "target.site"),
        (5, "waves[0].soak"),
        (5, "waves"),
        (8, "waves[1].sok"),
        (9, "waves[2].size"),
        (11, "gate"),
        (13, "gate.fals_halt"),
        (14, "completion"),
        (15, "deadlines.accept"),
        (15, "deadlines.download"),
        (16, "pace.in_flight"),
        (16, "pace.per_minute"),
        (17, "approval"),
    ]


@pytest.mark.parametrize(
    ("change", "path", "words"),
    [
        (("waves:", "wavse:"), "wavse", "did you mean 'waves'?"),
        (("environment: production", "due: 2026-03-12"), "target.tags.due", "got 2026-03-12; put it in quotes"),
        (("environment: production", "line: 3"), "target.tags.line", "got 3; put it in quotes"),
        (("motor-1.3.0", "1.3"), "name", "got 1.3; put it in quotes"),
        (("5%", "0.05"), "waves[0].size", "expected a percentage as in 5% or a number of devices, got 0.05"),
        (("25%", "5%"), "waves", "sizes that grow"),
        (("early", "canary"), "waves", "its own name"),
        (
            ("  - {name: fleet, size: 100%}", "  - {name: a, size: 100%}\n  - {name: b, size: 70}"),
            "waves",
            "100% only in",
        ),
        (("healthy: 2%", "healthy: 10%"), "gate", "got healthy 10% and limit 10%"),
        (("4h}", "4hours}"), "waves[0].soak", "expected a duration as in 30m, 4h or 1d12h"),
        (("{type: motor, tags: {environment: production}}", "[motor]"), "target", "expected keys and values"),
        (("{type: motor, tags: {environment: production}}", "{sites: berlin}"), "target.sites", "expected a list"),
        (("{type: motor, tags: {environment: production}}", "{ids: [a/b]}"), "target.ids[0]", "pattern"),
        (("{type: motor, tags: {environment: production}}", "{statuses: [on]}"), "target.statuses[0]", "'active'"),
        (("approval: none", "approval: [none]"), "approval", "'every-wave'"),
    ],
)
def test_a_mistake_says_what_was_expected(change: tuple[str, str], path: str, words: str) -> None:
    text = (
        GOOD.replace(change[0], change[1], 1) if change[0] != "early" else GOOD.replace("name: early", "name: canary")
    )
    assert path in [found for _, found in mistakes(text)]
    assert words in messages(text)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "got nothing"),
        ("# only a comment\n", 1, "got nothing"),
        ("- a\n", 1, "got a list"),
        ("motor\n", 1, "got str"),
        ("name: a\nwaves: [\n", 3, "not YAML"),
        ("name: a\n\tb: c\n", 2, "not YAML"),
        ("name: a\nname: b\n", 2, "duplicate key 'name'"),
        (b"name: a\nrelease: \xff\n", 2, "not UTF-8"),
        ("name: *unknown\n", 1, "not YAML"),
    ],
)
def test_what_is_no_yaml_is_told_with_its_line(text: str | bytes, line: int, words: str) -> None:
    assert mistakes(text) == [(line, "(document)")]
    assert words in messages(text)


def test_a_document_that_means_an_endless_one_is_refused_quickly() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    started = time.monotonic()
    assert "are there aliases in it?" in messages(bomb)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("text", ["[" * 5000, "a: " * 3000, "{a: " * 3000])
def test_endless_nesting_is_a_mistake_and_no_crash(text: str) -> None:
    assert mistakes(text)[0][1] == "(document)"


def test_a_yaml_tag_creates_no_object() -> None:
    text = GOOD.replace("name: motor-1.3.0", "name: !!python/object/apply:os.getcwd []")
    assert (1, "name") in mistakes(text)


def test_a_specification_of_unreasonable_size_is_refused_unread() -> None:
    assert "expected at most" in messages(b"#" * (MAX_SPEC_BYTES + 1))


def test_a_target_of_many_ids_is_read() -> None:
    ids = "".join(f"    - motor-{i}\n" for i in range(5_000))
    spec = parse_spec(
        GOOD.replace("target: {type: motor, tags: {environment: production}}", f"target:\n  ids:\n{ids}").encode(), "a"
    )
    assert len(spec.target.ids) == 5_000


def test_control_characters_of_a_specification_do_not_reach_a_message() -> None:
    assert "\x1b" not in messages(GOOD.replace("motor-controller@1.3.0", '"\\e[2J"'))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"there is no such file"):
        load_spec(tmp_path / "none.yaml")
    with pytest.raises(InvalidInputError, match="cannot read the specification"):
        load_spec(tmp_path)


def test_a_specification_survives_its_way_through_json() -> None:
    spec = parse_spec(GOOD.encode(), "a")
    assert RolloutSpec.model_validate_json(spec.model_dump_json()) == spec
    assert parse_spec(spec.model_dump_json().encode(), "b") == spec  # JSON is YAML
