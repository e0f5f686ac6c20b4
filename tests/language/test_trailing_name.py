"""The trailing name of a query, as Byzer writes it."""

from __future__ import annotations

import pytest

from sqlext.parser import trailing_name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("select a from t as q1", ("select a from t", "q1")),
        ("SELECT f(x) AS q\n AS q1", ("SELECT f(x) AS q", "q1")),
        ("with a as (select 1) from a as b", ("with a as (select 1) from a", "b")),
        ("from t as x", ("from t", "x")),
        ("select 1 as x", ("select 1", "x")),
        ('select 1 as "my ""t"', ("select 1", 'my "t')),
        ("select 1 as `my ``t`", ("select 1", "my `t")),
        ("select 1 -- as a\n as /* c */ b", ("select 1", "b")),
        ("select ' as x' as y", ("select ' as x'", "y")),
        ("select 1 from t", None),
        ("select ' as x'", None),
        ("select 1 -- as x", None),
        ("select 1 /* as x */", None),
        ("select cast(a as int)", None),
        ("select (select 1 as x)", None),
        ("select as", None),
        ("create view v as t", None),
        ("insert into t select 1 as x", None),
        ("as x", None),
        ("", None),
    ],
)
def test_a_trailing_name_is_proposed(text: str, expected: tuple[str, str] | None) -> None:
    """Only for queries, only at their end, and never from inside a string or comment."""
    assert trailing_name(text) == expected
