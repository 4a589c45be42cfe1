"""What README.md and docs/ name exists: links, commands and their options, make's targets, files, variables.

Each check is a function from a page's text to the mistakes in it; beside each stands a page that has one.
"""

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import typer

from cli.main import app
from cli.spec import parse_spec
from firmware.task import TASK_PAYLOAD_TYPE, decode_task
from models.jobspec import FleetJobSpec
from models.settings import Settings
from models.spec import RolloutSpec

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(ROOT.glob("docs/**/*.md"))
PROGRAMS = ("agent", "agent.fleet", "bench", "gateway")
READ_ELSEWHERE = {
    "TIDEGATE_ACTOR": "cli/command.py",
    "TIDEGATE_JOB_ID": "agent/custom.py",
    "TIDEGATE_ATTEMPT": "agent/custom.py",
    "TIDEGATE_TEST_DATABASE_URL": "tests/conftest.py",
}
"""Variables that are no settings, and where they are read."""

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_STARTER = re.compile(r"starter\.py((?: +[^\s`|;#()\"'\]\u0080-\uffff]+| +\"[^\"`]*\")*)")
_MODULE = re.compile(r"python -m ([a-z_.]+)((?: +[^\s`|;#()]+)*)")


def unfolded(text: str) -> str:
    """Commands that go on in the next line, in one."""
    return re.sub(r"\\\n\s*", "", text)


def anchors(text: str) -> set[str]:
    """What the headings of a page can be linked by."""
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def dead_links(page: Path, text: str) -> Iterator[str]:
    """Relative links to files that are not there, and to headings that are not in them."""
    for link in _LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(target.read_text() if name else text):
            yield f"{link}: no such heading"


def wrong_commands(text: str) -> Iterator[str]:
    """`starter.py ...` that the command line would not know, by its commands and the names of its options."""
    for written in _STARTER.findall(unfolded(text)):
        words = shlex.split(written)
        known: Any = typer.main.get_command(app)
        options = option_names(known)
        while words and hasattr(known, "commands") and not words[0].startswith("-"):
            word = words.pop(0).rstrip(".,:")
            if word in ("...", "COMMAND", ""):
                break
            if word not in known.commands:
                yield f"starter.py{written}: no command {word!r}"
                break
            known = known.commands[word]
            options |= option_names(known)
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            if option not in options:
                yield f"starter.py{written}: no option {option}"


def option_names(known: Any) -> set[str]:
    """Of a command."""
    return {"--help"}.union(*(set(parameter.opts + parameter.secondary_opts) for parameter in known.params))


def wrong_programs(text: str) -> Iterator[str]:
    """`python -m ...` with an option that the program does not have; only of our programs."""
    for module, written in _MODULE.findall(unfolded(text)):
        if module.partition(".")[0] not in {name.partition(".")[0] for name in PROGRAMS}:
            continue
        if module not in PROGRAMS:
            yield f"python -m {module}: no such program"
            continue
        options = re.findall(r"--[a-z-]+", written)
        help_text = "".join(helps(module)) if options else ""
        for option in options:
            if not re.search(rf"{option}\b(?!-)", help_text):
                yield f"python -m {module}: no option {option}"


def helps(module: str) -> Iterator[str]:
    """What a program says of its options, and of those of its commands."""
    package = importlib.import_module(module)
    inner: Any = package if hasattr(package, "_parser") else importlib.import_module(f"{module}.__main__")
    parser = inner._parser()
    yield parser.format_help()
    for action in parser._actions:
        for command in action.choices.values() if isinstance(action.choices, dict) else ():
            yield command.format_help()


def wrong_targets(text: str) -> Iterator[str]:
    """`make ...` of what the Makefile does not have; looked for where commands stand: in code."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL)
    for target in re.findall(r"(?:^|`)make ([a-z]+)", "\n".join(code), re.MULTILINE):
        if target not in targets:
            yield f"make {target}: no such target"


def missing_files(text: str) -> Iterator[str]:
    """Files of ours in code that are not there."""
    for name in re.findall(r"`((?:[a-z_]+/)+[\w-]+\.(?:py|md|toml))`", text):
        if not (ROOT / name).exists():
            yield f"{name}: no such file"


def unknown_variables(text: str) -> Iterator[str]:
    """TIDEGATE_... that nothing reads."""
    settings = {f"TIDEGATE_{name.upper()}" for name in Settings.model_fields}
    for variable in sorted(set(re.findall(r"TIDEGATE_[A-Z_]*[A-Z]", text))):
        if variable in settings:
            continue
        if variable not in READ_ELSEWHERE or variable not in (ROOT / READ_ELSEWHERE[variable]).read_text():
            yield f"{variable}: nothing reads it"


def mistakes(page: Path, text: str) -> list[str]:
    """All of them."""
    return [
        *dead_links(page, text),
        *wrong_commands(text),
        *wrong_programs(text),
        *wrong_targets(text),
        *missing_files(text),
        *unknown_variables(text),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    assert mistakes(page, page.read_text()) == []


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("see [there](docs/nowhere.md)", "docs/nowhere.md: no such file"),
        ("see [there](docs/protocol.md#nothing)", "docs/protocol.md#nothing: no such heading"),
        ("`python starter.py rollout begin x`", "starter.py rollout begin x: no command 'begin'"),
        ("`starter.py rollout start a.yaml --now`", "starter.py rollout start a.yaml --now: no option --now"),
        ("```sh\npython starter.py up \\\n  --wrong\n```", "starter.py up --wrong: no option --wrong"),
        ("`python -m agent --identity x`", "python -m agent: no option --identity"),
        ("`python -m agent.flock`", "python -m agent.flock: no such program"),
        ("```\nmake everything\n```", "make everything: no such target"),
        ("the ledger of `domain/accounts.py`", "domain/accounts.py: no such file"),
        ("set TIDEGATE_DATABASE", "TIDEGATE_DATABASE: nothing reads it"),
    ],
)
def test_what_does_not_exist_is_found(text: str, mistake: str) -> None:
    assert mistakes(ROOT / "README.md", text) == [mistake]


def test_the_readme_says_in_its_first_screen_what_it_is_and_which_two_commands_show_it() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    for said in ("Tidegate", "make demo", "make test", "Temporal", "waves"):
        assert said in first_screen


def test_every_decision_is_in_the_list_of_decisions() -> None:
    listed = _LINK.findall((ROOT / "docs/adr/README.md").read_text())
    assert listed == sorted(path.name for path in (ROOT / "docs/adr").glob("0*.md"))


def test_the_readmes_specification_is_read_and_shows_the_defaults() -> None:
    [written] = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    spec = parse_spec(written.encode(), "README.md")
    assert spec == RolloutSpec(name=spec.name, release=spec.release, target=spec.target, waves=spec.waves)


def test_the_specification_in_the_jobs_page_is_read_and_its_document_is_strict_json() -> None:
    page = (ROOT / "docs/jobs.md").read_text()
    [written] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert parse_spec(written.encode(), "jobs.md", FleetJobSpec).max_parallel == 50
    document, task = (json.loads(text) for text in re.findall(r"```json\n(.*?)```", page, re.DOTALL))
    assert document["order"]["payloadType"] == TASK_PAYLOAD_TYPE
    assert decode_task(orjson.dumps(task)).payload == {"calibrate": document["calibrate"]}


def test_the_tutorials_specifications_are_read() -> None:
    written = re.findall(r"<<'YAML'\n(.*?)YAML\n", (ROOT / "docs/tutorial.md").read_text(), re.DOTALL)
    assert [parse_spec(text.encode(), "tutorial.md").name for text in written] == [
        "motor-1.3.0",
        "motor-1.3.1",
        "motor-1.3.2",
    ]
