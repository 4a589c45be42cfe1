"""Shares as people write them: what is written back is the same share, however small."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.quantities import format_share, parse_share
from models.spec import GateSpec


@given(st.integers(min_value=0, max_value=10**18), st.integers(min_value=0, max_value=18))
def test_a_share_that_a_person_can_write_survives_writing_and_reading(digits: int, places: int) -> None:
    share = Fraction(digits, 10**places) / 100
    if share <= 1:
        assert parse_share(format_share(share)) == share


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (Fraction(1, 1000), "0.1%"),
        (Fraction(1), "100%"),
        (Fraction(0), "0%"),
        (Fraction(1, 10**15), "0.0000000000001%"),
        (Fraction(1, 3), "33.333333%"),
        (Fraction(1, 10**9 * 3), "0%"),
    ],
)
def test_a_share_is_written_as_a_person_would(share: Fraction, text: str) -> None:
    assert format_share(share) == text


def test_a_gate_with_a_tiny_error_probability_survives_its_way_to_the_workflow() -> None:
    gate = GateSpec.model_validate({"false_halt": "0.0000000000001%"})
    assert GateSpec.model_validate_json(gate.model_dump_json()) == gate
