"""The case files: what a person types, and what they get."""

from __future__ import annotations

import pytest

from .cases import outcome, read


@pytest.mark.parametrize(("text", "expected"), read("statements.txt"))
def test_a_statement_parses_to_what_its_case_says(text: str, expected: str) -> None:
    """Each statement of the case file becomes exactly the dataclass written under it."""
    assert outcome(text) == expected


@pytest.mark.parametrize(("text", "expected"), read("errors.txt"))
def test_a_wrong_statement_says_where_what_and_how_to_go_on(text: str, expected: str) -> None:
    """Each error names its line and column, the cause and the next step, as written under the case."""
    assert outcome(text) == expected


@pytest.mark.parametrize(("text", "expected"), read("errors.txt"))
def test_no_error_repeats_a_secret(text: str, expected: str) -> None:
    """What stands behind a key's name is in no error."""
    for secret in ("sk-live-0123456789", "sk-abcdef123456", "hidden"):
        assert secret not in outcome(text), (text, expected)
