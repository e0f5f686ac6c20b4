"""What makes two calls one."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.gateway.keys import CallKeys
from runtime.spec import CallOptions, Message, Prompt

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # with lone surrogates and NUL
PROMPTS: st.SearchStrategy[Prompt] = ANY_TEXT | st.lists(st.builds(Message, ANY_TEXT, ANY_TEXT), max_size=3).map(
    tuple
)
NUMBERS = st.none() | st.sampled_from([0, 0.0, 1, 1.0, 0.5, 2, True])
OPTIONS = st.builds(
    CallOptions,
    system=st.none() | ANY_TEXT,
    temperature=NUMBERS,
    max_tokens=st.none() | st.integers(0, 3),
    top_p=NUMBERS,
    stop=st.lists(ANY_TEXT, max_size=2).map(tuple),
    extra=st.dictionaries(st.sampled_from("ab"), NUMBERS.filter(lambda n: n is not None) | ANY_TEXT, max_size=2).map(
        lambda said: tuple(sorted(said.items()))
    ),
)


@given(PROMPTS, PROMPTS)
def test_prompts_collide_only_when_equal(one: Prompt, two: Prompt) -> None:
    """Texts and conversations have equal keys when they are equal, and a key has 16 bytes."""
    keys = CallKeys("f", CallOptions())
    assert (keys.of(one) == keys.of(two)) == (one == two)
    assert len(keys.of(one)) == 16


@given(OPTIONS, OPTIONS)
def test_options_collide_only_when_equal(one: CallOptions, two: CallOptions) -> None:
    """Options that compare equal give equal keys, others do not."""
    assert (CallKeys("f", one).of("x") == CallKeys("f", two).of("x")) == (one == two)


MESSAGES = [
    (Message("user", "ab"), Message("user", "")),
    (Message("user", "a"), Message("userb", "")),
    (Message("user", "abuser"),),
    (Message("user", "ab"),),
    (),
]


def test_every_change_gives_another_key() -> None:
    """Model, each option, an empty option and one not said, and where one message ends are all told apart."""
    changed = [
        CallOptions(system=""),
        CallOptions(system="s"),
        CallOptions(temperature=0.0),
        CallOptions(temperature=0.5),
        CallOptions(max_tokens=5),
        CallOptions(top_p=0.5),
        CallOptions(top_k=5),
        CallOptions(stop=("a", "b")),
        CallOptions(stop=("a, b",)),
        CallOptions(seed=5),
        CallOptions(extra=(("top_k", 5),)),
        CallOptions(extra=(("top_k", "5"),)),
        CallOptions(extra=(("top_k", (5,)),)),
    ]
    keys = [CallKeys("f", options).of("x") for options in changed]
    keys += [CallKeys("f", CallOptions()).of(prompt) for prompt in ("x", "", "\0", *MESSAGES)]
    keys += [CallKeys("", CallOptions()).of("x"), CallKeys("g", CallOptions()).of("x")]
    assert len(set(keys)) == len(keys)


def test_keys_are_those_of_other_processes() -> None:
    """A key does not hang on the process that makes it, nor change from release to release."""
    program = (
        "from runtime.gateway.keys import CallKeys; from runtime.spec import CallOptions, Message\n"
        "keys = CallKeys('f', CallOptions('be brief', 0.5, 9, stop=('.',), seed=3, extra=(('a', True), ('b', (1, 'x')))))\n"
        "print(keys.of('text').hex(), keys.of((Message('user', 'text'),)).hex())"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert told[0] == told[1] == ["880d74079b6dd81698b70de36642cd67", "0d251452814f9dee976839b1f66b8991"]


@pytest.mark.parametrize("text", ["\ud83d\ude00", "\udcff", "a\0b", "x" * 100_000])
def test_any_text_has_a_key(text: str) -> None:
    """Lone surrogates, NUL and long texts are prompts like others."""
    keys = CallKeys("f", CallOptions())
    assert keys.of(text) not in (keys.of(text + "x"), keys.of("\U0001f600"))
