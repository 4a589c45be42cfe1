"""Writes docs/reference.md from the settings, the commands, the programs' options and the metrics.

`python docs/generate_reference.py` writes it, `--check` says whether it is up to date (exit status 1 when not).
"""

import argparse
import importlib
import sys
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer
from prometheus_client import REGISTRY

from cli.main import app
from models.settings import Endpoints, Settings

REFERENCE = Path(__file__).with_name("reference.md")
SHARED_OPTIONS = ("state", "json", "debug")
"""Options that every command has; described once."""
PROGRAMS = {
    "python worker.py": ("worker", "_parser"),
    "python -m gateway": ("gateway.__main__", "_parser"),
    "python -m access": ("access.__main__", "_parser"),
    "python -m agent": ("agent.__main__", "_parser"),
    "python -m agent.fleet": ("agent.fleet", "_parser"),
    "python -m bench": ("bench.__main__", "_parser"),
}
WITH_METRICS = (
    "observe.metrics",
    "gateway.service",
    "gateway.alerting",
    "access.keeper",
    "worker",
    "devstack.artifacts",
)
INTRODUCTION = """\
# Reference

Made by `make docs` from the program itself; edit the descriptions there.

"""


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description="Write docs/reference.md from the program.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args()
    text = reference()
    if not options.check:
        REFERENCE.write_text(text)
    elif not REFERENCE.exists() or REFERENCE.read_text() != text:
        sys.exit("docs/reference.md is not what the program says; run 'make docs' and commit it")


def reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION, *settings_part(), *commands_part(), *programs_part(), *metrics_part()]
    return "".join(parts).rstrip() + "\n"


def settings_part() -> Iterator[str]:
    """Environment variables, and the file that fills what they leave out."""
    yield "## Settings\n\nRead from the environment by every process. An address that is set means: that server is "
    yield "somebody else's, `starter.py up` does not start one. What is not set is taken from `endpoints.json` in the "
    yield "state directory.\n\n"
    rows = (
        (f"`TIDEGATE_{name.upper()}`", _default(field.default), field.description or "")
        for name, field in Settings.model_fields.items()
    )
    yield from table(("variable", "default", "meaning"), rows)
    names = ", ".join(f"`{name}`" for name in Endpoints.model_fields)
    yield f"`endpoints.json` has {names}; null where a piece does not apply. It is there while everything answers.\n\n"


def commands_part() -> Iterator[str]:
    """`starter.py` and all its commands."""
    root = typer.main.get_command(app)
    yield f"## Commands\n\n`python starter.py COMMAND`, or `tidegate COMMAND` where the project is installed.\n\n{root.epilog or ''}\n\n"
    yield "Every command takes:\n\n"
    yield from table(("option", "meaning"), ((_shape(p), _help(p)) for p in root.params if p.name in SHARED_OPTIONS))
    yield from _command(root, "starter.py")


def _command(command: Any, path: str) -> Iterator[str]:
    children = getattr(command, "commands", None)
    if children is None:
        yield f"### `{path}`\n\n{(command.help or '').strip()}\n\n"
        own = [p for p in command.params if p.name != "help" and not (p.name in SHARED_OPTIONS and _is_shared(p))]
        yield from table(("argument or option", "meaning"), ((_shape(p), _help(p)) for p in own))
        return
    for name in children:
        yield from _command(children[name], f"{path} {name}")


def _is_shared(parameter: Any) -> bool:
    """Whether an option is the one that every command has, and not another of its name."""
    shared = {p.name: vars(p)["help"] for p in typer.main.get_command(app).params if p.name in SHARED_OPTIONS}
    return bool(parameter.help == shared[parameter.name])


def _shape(parameter: Any) -> str:
    """`--pace N`, `--wait`, `SPEC.yaml`."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    names = "/".join((*parameter.opts, *parameter.secondary_opts))
    if parameter.is_bool_flag:
        return f"`{names}`"
    return f"`{names} {parameter.metavar or _placeholder(parameter)}`"


def _placeholder(parameter: Any) -> str:
    annotation = parameter.type_descriptor.annotation
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    return {Path: "PATH", int: "N", float: "X"}.get(annotation, "TEXT")


def _help(parameter: Any) -> str:
    text = (parameter.help or "").strip()
    if parameter.required:
        return f"{text} Required."
    plain = parameter.default not in (None, False, "", (), []) and not callable(parameter.default)
    if not plain or parameter.param_type_name == "argument":
        return text
    default = parameter.default
    shown = (parameter.opts[0] if default else parameter.secondary_opts[0]) if parameter.is_bool_flag else default
    return f"{text} Default: `{shown}`."


def programs_part() -> Iterator[str]:
    """Programs with options of their own."""
    yield "## Programs\n\n"
    for title, (module, function) in PROGRAMS.items():
        make = getattr(importlib.import_module(module), function, None)
        if make is None:
            yield f"### `{title}`\n\nNo options; everything comes from the settings.\n\n"
            continue
        yield from _program(make(), title)


def _program(parser: argparse.ArgumentParser, title: str) -> Iterator[str]:
    yield f"### `{title}`\n\n" + (f"{parser.description}\n\n" if parser.description else "")
    actions = [action for action in parser._actions if action.dest != "help"]
    children = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    rows = [(_argument(action), _argument_help(parser, action)) for action in actions if action not in children]
    yield from table(("option", "meaning"), rows)
    for name, child in (pair for action in children for pair in action.choices.items()):
        yield from _program(child, f"{title} {name}")


def _argument(action: argparse.Action) -> str:
    names = "/".join(action.option_strings) or action.dest
    if action.nargs == 0:
        return f"`{names}`"
    metavar = action.metavar if isinstance(action.metavar, str) else None
    choices = "|".join(map(str, action.choices)) if action.choices else None
    return f"`{names} {metavar or choices or action.dest.upper()}`"


def _argument_help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    values = vars(action) | {"prog": parser.prog}
    return (action.help or "") % values


def metrics_part() -> Iterator[str]:
    """Prometheus metrics of our own."""
    yield "## Metrics\n\nEvery process serves Prometheus metrics, those of prometheus_client about the process itself "
    yield "(CPU, memory, open files) among them; `endpoints.json` says where.\n\n"
    for module in WITH_METRICS:
        importlib.import_module(module)
    families = sorted((f for f in REGISTRY.collect() if f.name.startswith("tidegate_")), key=lambda f: f.name)
    suffixes = {"counter": "_total", "info": "_info"}
    rows = ((f"`{f.name}{suffixes.get(f.type, '')}`", f.type, f.documentation) for f in families)
    yield from table(("metric", "type", "meaning"), rows)


def table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """A Markdown table; nothing where there are no rows."""
    lines = [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    if lines:
        yield f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n"
        yield from (f"| {line} |\n" for line in lines)
        yield "\n"


def _default(value: object) -> str:
    return "" if value is None else f"`{value}`"


if __name__ == "__main__":
    main()
