"""Runs commands of the command line in this process, as `starter.py` would."""

import json
from dataclasses import dataclass
from typing import Any

from typer.testing import CliRunner

from cli.main import app


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which has to be one JSON document."""
        return json.loads(self.out)

    @property
    def json_lines(self) -> list[Any]:
        """Standard output, which has to be JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


def run(*arguments: object, stdin: bytes | None = None, traceback: bool = False, **environment: str) -> Ran:
    """Run `starter.py ARGUMENTS`; a traceback is an error of the test."""
    given = {"COLUMNS": "200", "TERM": "dumb", **environment}
    result = CliRunner().invoke(app, [str(each) for each in arguments], input=stdin, env=given)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert traceback or "Traceback" not in result.stderr
    return Ran(result.exit_code, result.stdout, result.stderr)
