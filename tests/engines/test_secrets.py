"""Keys by reference, and texts without keys."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest

from runtime.errors import UserError
from runtime.secrets import Secret, quotes, redact, resolve, travelling
from runtime.spec import Message, ModelSpec

KEY = "q7Zt-canary-88f1e2d3c4"


def test_a_secret_shows_itself_nowhere():
    """Not by itself, not in a format, not in what holds it; equal ones are equal."""
    secret = Secret(KEY)
    spec = replace(ModelSpec("m", "openai"), options=(("api_key", secret),))
    shown = [str(secret), repr(secret), f"{secret:>40}", f"{spec}", repr([secret]), str({1: secret})]
    assert not [text for text in shown if KEY in text]
    assert secret.reveal() == KEY
    assert secret == Secret(KEY)
    assert len({secret, Secret(KEY), Secret("another")}) == 2
    with pytest.raises(TypeError):
        json.dumps(secret)
    with pytest.raises(TypeError):
        "Bearer " + secret


def test_a_secret_travels_whole():
    """A worker must be able to use it."""
    assert pickle.loads(pickle.dumps(Secret(KEY))).reveal() == KEY


def test_a_key_is_found_where_it_was_said_to_be(monkeypatch, tmp_path):
    """In the environment, in a file without its last line end, or as it stands."""
    monkeypatch.setenv("SQLEXT_TEST_KEY", KEY)
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert {resolve(said).reveal() for said in ("env:SQLEXT_TEST_KEY", f"file:{file}", KEY, Secret(KEY))} == {KEY}


@pytest.mark.parametrize("said", ["env:SQLEXT_NOWHERE", "file:/nowhere/key", "env:SQLEXT_EMPTY", "env:", "file:", ""])
def test_a_key_that_is_not_there_is_named(monkeypatch, said):
    """Missing and empty are the same mistake; the error says what to set, and where."""
    monkeypatch.setenv("SQLEXT_EMPTY", " ")
    with pytest.raises(UserError) as caught:
        resolve(said)
    assert caught.value.code == "secret_missing"
    assert said.partition(":")[2] in caught.value.message
    assert "before" in caught.value.hint


@pytest.mark.parametrize("value", ["two words", "line\nend", "schlüssel", "tab\tkey"])
def test_what_cannot_be_a_key_is_refused_unseen(monkeypatch, value):
    """It could not stand in a header, and an error further down might show it."""
    monkeypatch.setenv("SQLEXT_TEST_KEY", value)
    with pytest.raises(UserError, match="no key") as caught:
        resolve("env:SQLEXT_TEST_KEY")
    assert value not in str(caught.value)


def test_a_key_pasted_as_a_name_is_not_shown():
    """`env:` before the key itself is a likely slip."""
    with pytest.raises(UserError) as caught:
        resolve("env:sk-proj-0123456789abcdef")
    assert "0123456789" not in str(caught.value)


def test_a_reference_travels_unless_it_can_be_followed_here(monkeypatch):
    """To other machines the reference; to workers of this one what the process has now; a key never in the open."""
    monkeypatch.setenv("SQLEXT_TEST_KEY", KEY)
    assert travelling("env:SQLEXT_TEST_KEY", here=False) == "env:SQLEXT_TEST_KEY"
    assert travelling("env:SQLEXT_TEST_KEY", here=True) == Secret(KEY)
    assert travelling("env:SQLEXT_NOWHERE", here=True) == "env:SQLEXT_NOWHERE"
    assert travelling(KEY, here=False) == Secret(KEY)


@pytest.mark.parametrize(
    "text",
    [
        "refused sk-proj-KEYKEYKEY1",
        "hf_KEYKEYKEY1 is no token",
        "Authorization: Bearer KEYKEY/KEY+1==",
        "authorization bearer KEYKEYKEY1",
        "see https://me:KEYKEYKEY1@host/v1",
        "see https://KEYKEYKEY1@host/v1",
        "GET /v1?api_key=KEYKEYKEY1&x=1",
        '{"api_key": "KEYKEYKEY1"}',
        "x-api-key: KEYKEYKEY1",
        "password=KEYKEYKEY1",
        "token='KEYKEYKEY1'",
        "AKIAKEYKEYKEY1234567",
        "eyJhKEYKEYKEY.eyJzdWIiKEYKEYKEY.abc",
    ],
)
def test_what_looks_like_a_key_is_hidden(text):
    """In whatever it stands."""
    assert "KEYKEY" not in redact(text)
    assert "***" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "The model has 4096 tokens: too few for 5000.",
        "max_tokens: 100000 is too large",
        "No module named 'desk-top' in ask-model-of-mine",
        "Connect to http://127.0.0.1:8000/v1 failed",
        "mail me@example.com",
    ],
)
def test_other_texts_stay_as_they_are(text):
    """Words of everyday are no keys."""
    assert redact(text) == text


def test_every_key_that_was_resolved_is_hidden():
    """Whatever it looks like, also within another; but for texts too short to be one."""
    Secret("plainlooking")
    Secret("plainlookinglonger")
    Secret("abc")
    assert redact("abc plainlookinglonger, plainlooking.") == "abc ***, ***."
    assert redact("own-key-1", [("api_key", "own-key-1"), ("dtype", "float16")]) == "***"
    assert redact("float16", [("api_key", "own-key-1"), ("dtype", "float16")]) == "float16"


def test_a_text_quotes_what_it_repeats():
    """Short prompts whole, long ones in parts, conversations and the system message too."""
    assert quotes("bad value 'abc'", ["abc"])
    assert quotes("near: My name is Ann", ["Dear all. My name is Ann, and"])
    assert quotes("in the conversation", [(Message("user", "told in the conversation"),)])
    assert quotes("the secret recipe", ["x"], "Keep the secret recipe")
    assert not quotes("invalid value", ["ab", "My name is Ann"])
