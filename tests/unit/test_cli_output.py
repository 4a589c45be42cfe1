"""Tables on terminals of all widths."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from cli import output
from cli.output import FittedTable, table

COLUMNS = ("device", "state", "attempt", "step", "next attempt", "reason")
ROWS = [
    ("motor-38", "REJECTED", 1, "", None, "operation custom: this device knows no custom operation"),
    ("motor-137", "SUCCEEDED", 12, "", None, "took the second attempt, after a power cut in the first one"),
]
WORDS = ("device", "state", "attempt", "motor-38", "motor-137", "REJECTED", "SUCCEEDED", "operation", "custom:")


def drawn(width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table("", COLUMNS, ROWS, right=("attempt",)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_table_breaks_long_texts_between_words_and_leaves_empty_columns_out(width: int) -> None:
    shown = drawn(width)
    assert all(word in shown.split() for word in WORDS), shown
    assert "step" not in shown and "next" not in shown and "…" not in shown
    assert max(map(len, shown.splitlines())) <= width


def test_a_table_that_has_room_shows_every_column_in_one_line_a_row() -> None:
    shown = drawn(160)
    assert "step" in shown and "next attempt" in shown and ROWS[0][-1] in shown


def test_nothing_is_lost_where_even_words_have_to_break() -> None:
    shown = "".join(drawn(34).split())
    assert "…" not in shown and "REJECTED"[:3] in shown


def test_without_fitting_words_would_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "FittedTable", Table)
    assert issubclass(FittedTable, Table)
    assert not all(word in drawn(60).split() for word in WORDS)
