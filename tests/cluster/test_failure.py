"""Failures as data: the right class, and no row text or key in what is said."""

from __future__ import annotations

import pickle

import pytest

from runtime.cluster.failure import Failure, failure
from runtime.errors import Fatal, RowError, WorkerLost
from runtime.spec import Batch, CallOptions, Message, ModelSpec

SPEC = ModelSpec("m", "e", options=(("api_key", "key-1234567"), ("dtype", "float16")))


class Vendor(Fatal):
    """An error class of another package."""


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError


def said(error: Exception, *prompts: object, system: str | None = None) -> Failure:
    return failure(error, SPEC, Batch(1, CallOptions(system=system), prompts))


@pytest.mark.parametrize("error", [RowError("r", code="c", hint="h"), WorkerLost("w"), Fatal("f")])
def test_ours_come_back_as_they_were(error):
    """Class, message, code and hint, through a pickle."""
    back = pickle.loads(pickle.dumps(said(error, "x"))).error()
    assert (type(back), back.info) == (type(error), error.info)


def test_a_subclass_of_ours_comes_back_as_its_nearest():
    """The asking process may not have its class."""
    assert said(Vendor("v", code="closed")).kind == "Fatal"


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("bad value 'abc'", ["abc"]),
        ("cannot parse: My name is Ann", ["Dear all. My name is Ann, and"]),
        ("unexpected in the conversation here", [(Message("user", "in the conversation"),)]),
    ],
)
def test_a_text_that_quotes_a_prompt_is_dropped(text, prompts):
    """The class and the place remain."""
    assert said(ValueError(text), *prompts).info.message == "ValueError in the engine."


def test_a_text_that_quotes_the_system_prompt_is_dropped():
    """It is the user's text too."""
    assert (
        "secret recipe"
        not in said(ValueError("the secret recipe"), "x", system="Keep the secret recipe").info.message
    )


@pytest.mark.parametrize("text", ["refused key-1234567", "Incorrect API key provided: sk-proj-abcdef123456"])
def test_keys_are_masked(text):
    """Those of the options and those that look like one."""
    message = said(ValueError(text), "x").info.message
    assert "***" in message
    assert "1234567" not in message
    assert "abcdef" not in message


def test_one_short_line():
    """However long the text was, and even if it cannot be had."""
    assert len(said(ValueError("x" * 5000 + "\nmore"), "y").info.message) < 300
    assert said(Mute(), "y").info.message == "Mute in the engine."
