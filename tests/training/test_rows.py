"""The four forms of training rows, and what a bad row is called."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runtime.errors import RowError, UserError
from runtime.spec import Message
from runtime.training.rows import find_form, read_row

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def read(row: dict[str, Any]) -> Any:
    said = read_row(find_form(row.keys()), row)
    return said if isinstance(said, str) else [(turn.role, turn.content) for turn in said]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": TURNS, "id": 1}, [("user", "q"), ("assistant", "a")]),
        ({"Messages": json.dumps(TURNS)}, [("user", "q"), ("assistant", "a")]),
        ({"messages": [*TURNS, TURNS[0]]}, [("user", "q"), ("assistant", "a")]),
        ({"messages": [{"role": "system", "content": ""}, *TURNS]}, [("system", ""), ("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "output": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "input": "i", "output": "a", "history": []}, [("user", "q\ni"), ("assistant", "a")]),
        ({"instruction": "q", "input": None, "output": "a", "history": None}, [("user", "q"), ("assistant", "a")]),
        (
            {"instruction": "q", "input": "", "output": "a", "history": [["h", "r"]], "system": "s"},
            [("system", "s"), ("user", "h"), ("assistant", "r"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {"instruction": "q", "output": "a", "history": '[["h", "r"]]'},
            [("user", "h"), ("assistant", "r"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {"category": "x", "conversation": [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": "b"}]},
            [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")],
        ),
        ({"meta_instruction": "m", "conversation": '[{"human": "q", "assistant": "a"}]'}, [("user", "q"), ("assistant", "a")]),
        ({"text": " all of it ", "file": "f"}, " all of it "),
        ({"file": "f", "value": "line"}, "line"),
        ({"filename": "f", "content": "whole", "size": 5, "last_modified": "x"}, "whole"),
    ],
)  # fmt: skip
def test_each_form_is_found_from_its_columns(row: dict[str, Any], expected: object) -> None:
    """OpenAI, Alpaca, MOSS and plain text; JSON text of lists; other columns are not looked at."""
    assert read(row) == expected


def test_text_parts_of_a_content_are_joined() -> None:
    """As OpenAI writes them; a part of another kind is no text."""
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert read({"messages": [{"role": "user", "content": parts}, TURNS[1]]})[0] == ("user", "a b")
    with pytest.raises(RowError) as caught:
        read({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, TURNS[1]]})
    assert caught.value.code == "row_type"


def test_an_answer_of_weight_0_is_not_to_be_learnt() -> None:
    """What comes after the last one to learn is left out; without any there is nothing to learn."""
    silent = {**TURNS[1], "weight": 0}
    said = read_row(find_form(["messages"]), {"messages": [TURNS[0], silent, *TURNS, TURNS[0], silent]})
    assert [getattr(turn, "weight", None) for turn in said] == [1, 0, 1, 1]
    for weight, code in ((0, "row_no_answer"), (0.5, "row_type"), ("1", "row_type")):
        with pytest.raises(RowError) as caught:
            read({"messages": [TURNS[0], {**TURNS[1], "weight": weight}]})
        assert caught.value.code == code
    assert read({"messages": [TURNS[0], {**TURNS[1], "weight": None, "tool_calls": None}]})


def test_a_message_that_calls_tools_has_a_code_of_its_own() -> None:
    """Whether or not it says something beside."""
    for content in (None, "let me see"):
        with pytest.raises(RowError) as caught:
            read({"messages": [TURNS[0], {"role": "assistant", "content": content, "tool_calls": [{"id": "x"}]}]})
        assert caught.value.code == "row_tool_calls"


def test_a_conversation_is_made_of_messages() -> None:
    """As serving has them."""
    assert read_row(find_form(["messages"]), {"messages": TURNS}) == (Message("user", "q"), Message("assistant", "a"))


@pytest.mark.parametrize(
    ("columns", "near"),
    [
        (["prompt", "completion"], None),
        (["mesages"], "messages"),
        (["instruction", "outputs"], "output"),
        (["file", "value", "label"], None),
        ([], None),
    ],
)
def test_other_columns_are_one_clear_error(columns: list[str], near: str | None) -> None:
    """It names the columns found, the forms, and the near one."""
    with pytest.raises(UserError) as caught:
        find_form(columns)
    assert caught.value.code == "training_columns"
    assert all(column in caught.value.message for column in columns)
    for word in ("messages", "instruction", "conversation", "text"):
        assert word in str(caught.value.hint)
    assert near is None or f'meant to be "{near}"' in str(caught.value.hint)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"messages": None}, "row_null"),
        ({"messages": [{"role": "user", "content": None}]}, "row_null"),
        ({"messages": [{"content": "x"}]}, "row_null"),
        ({"messages": "[not json"}, "row_type"),
        ({"messages": 5}, "row_type"),
        ({"messages": ["x"]}, "row_type"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "row_type"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "row_type"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "row_role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "row_role"),
        ({"messages": [TURNS[0]]}, "row_no_answer"),
        ({"messages": []}, "row_no_answer"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": " "}]}, "row_empty"),
        ({"instruction": None, "output": "a"}, "row_null"),
        ({"instruction": "q", "output": None}, "row_null"),
        ({"instruction": "q", "output": ""}, "row_empty"),
        ({"instruction": "q", "output": "a", "history": [["only"]]}, "row_type"),
        ({"instruction": "q", "output": "a", "history": [["h", None]]}, "row_null"),
        ({"instruction": "q", "output": "a", "input": 5}, "row_type"),
        ({"conversation": [{"human": "q"}]}, "row_null"),
        ({"conversation": [{"human": "q", "assistant": 1}]}, "row_type"),
        ({"text": None}, "row_null"),
        ({"text": "\n "}, "row_empty"),
        ({"text": 5}, "row_type"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(row: dict[str, Any], code: str) -> None:
    """By a code, and never with what stands in it."""
    with pytest.raises(RowError) as caught:
        read(row)
    assert caught.value.code == code
    assert "bot" not in caught.value.message
