"""Answers held to a schema by the default engine: token by token, whatever else runs beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from asking import ask

from runtime.engines import Engine
from runtime.engines.grammar import Grammars, constrain
from runtime.errors import Fatal
from runtime.schema import closed, text_of, unfit
from udfs.typed import schema_from

ANIMAL = schema_from("STRUCT(kind ENUM('cat', 'dog'), legs UTINYINT, wild BOOLEAN)")
PROMPTS = ["a", "the quick brown fox", "good morning", "select name", "x" * 40]


@pytest.fixture(scope="module")
def chat(engine: Callable[..., Engine]) -> Engine:
    return engine("transformers", "chat", max_num_seqs=3)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 1.0, "top_k": 1, "seed": 1}]
)
def test_answers_are_compact_json_that_fits(chat: Engine, options: dict[str, float]):
    """Greedy or sampled, with more rows than run at once: what the options choose from is what the schema allows."""
    for reply in ask(chat, PROMPTS, schema=ANIMAL, max_tokens=60, **options):
        assert unfit(ANIMAL, reply.output, reply.finish_reason) is None
        assert reply.output == json.dumps(json.loads(reply.output), separators=(",", ":"))
        assert reply.finish_reason == "stop"


def test_a_schema_changes_nothing_for_calls_without_one(chat: Engine):
    """Free answers are the same before and after typed ones."""
    before = [reply.output for reply in ask(chat, PROMPTS, max_tokens=12)]
    ask(chat, PROMPTS, schema=ANIMAL, max_tokens=60)
    assert [reply.output for reply in ask(chat, PROMPTS, max_tokens=12)] == before


def test_typed_answers_do_not_depend_on_their_company(chat: Engine):
    """A row alone answers as among others."""
    together = [reply.output for reply in ask(chat, PROMPTS, schema=ANIMAL, max_tokens=60)]
    alone = [ask(chat, [prompt], schema=ANIMAL, max_tokens=60)[0].output for prompt in PROMPTS]
    assert together == alone


def test_an_answer_that_does_not_fit_its_limit_is_cut(chat: Engine):
    """max_tokens holds for typed answers, and the reason says so."""
    [reply] = ask(chat, ["a"], schema=ANIMAL, max_tokens=3)
    assert (reply.finish_reason, reply.completion_tokens) == ("length", 3)
    assert unfit(ANIMAL, reply.output, reply.finish_reason).code == "answer_cut"


@pytest.mark.parametrize(
    "values",
    [
        ['it\'s "quoted"', "back\\slash", "new\nline"],
        ["é", "漢字", "🦆🦆", "\u202e"],
        ["a", "ab", "abc"],
        ["", " "],
        ["</s>", "<|end|>", "<|assistant|>"],
        [f"code-{number:05}" for number in range(3000)],
        [0.5, -1, True],
    ],
)
def test_any_values_can_be_chosen(chat: Engine, values: list[object]):
    """Quotes, other scripts, texts that begin alike, the model's own special tokens, and long lists."""
    schema = schema_from(values)
    replies = ask(chat, PROMPTS, schema=schema, max_tokens=80, temperature=1.0, seed=5)
    assert all(json.loads(reply.output) in values for reply in replies)


def test_recursive_schemas_are_followed(chat: Engine):
    """What contains itself is held to at every depth."""
    node = {
        "$defs": {
            "n": {
                "type": "object",
                "properties": {
                    "v": {"type": "boolean"},
                    "c": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 1},
                },
                "required": ["v", "c"],
            }
        },
        "$ref": "#/$defs/n",
    }
    schema = text_of(closed(node))
    replies = ask(chat, PROMPTS, schema=schema, max_tokens=110, temperature=1.0, seed=2)
    assert all(unfit(schema, reply.output, "stop") is None for reply in replies if reply.finish_reason == "stop")
    assert any(reply.finish_reason == "stop" for reply in replies)


def test_sliding_windows_and_processors_that_read_are_no_obstacle(engine: Callable[..., Engine]):
    """Rows that may not join a running set, and options that look at the tokens so far, keep to the schema too."""
    sliding = engine("transformers", "sliding")
    replies = ask(sliding, PROMPTS, schema=ANIMAL, max_tokens=60, extra=(("repetition_penalty", 1.3),))
    assert all(unfit(ANIMAL, reply.output, reply.finish_reason) is None for reply in replies)


@pytest.mark.parametrize(
    "schema", [{"not": {"type": "string"}}, {"$ref": "#"}, {"type": "integer", "minimum": 5, "maximum": 3}]
)
def test_a_schema_that_cannot_guide_stops_the_statement(chat: Engine, schema: dict[str, object]):
    """What the library does not know, or nothing can fit, is one error with its cause."""
    with pytest.raises(Fatal) as caught:
        ask(chat, ["a"], schema=text_of(closed(schema)), max_tokens=9)
    assert caught.value.code == "schema_unsupported"
    assert caught.value.hint


def test_a_tokenizer_without_a_fast_form_is_named():
    """The grammar needs the bytes of each token, which only fast tokenizers tell."""

    class Slow:
        is_fast = False

    with pytest.raises(Fatal) as caught:
        Grammars(Slow(), 10, [1]).guides(ANIMAL, 1)
    assert caught.value.code == "schema_tokenizer"


def test_only_rows_with_a_guide_lose_scores(chat: Engine, folders: Callable[[str], Path]):
    """In a set of rows each is held to its own schema, or to none; scores beyond the tokenizer's words go too."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders("chat"))
    grammars = Grammars(tokenizer, len(tokenizer) + 70, [tokenizer.eos_token_id])
    [yes], [number] = grammars.guides(schema_from(["yes"]), 1), grammars.guides(schema_from("UTINYINT"), 1)
    scores = constrain(torch.zeros(3, len(tokenizer) + 70), [yes, None, number])
    assert torch.isfinite(scores[1]).all()

    def begins(row: int) -> Iterator[str]:
        return (tokenizer.decode([token]) for token in torch.isfinite(scores[row]).nonzero()[:, 0].tolist())

    assert all('"yes"'.startswith(text) for text in begins(0))
    assert all(0 <= int(text) <= 255 for text in begins(2))
