"""The transformers engine against `model.generate` of the same model, and what its options do."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import Reply, ask

from runtime.engines import Engine
from runtime.errors import Fatal, OutOfMemory, UserError
from runtime.prompts.chat import render
from runtime.spec import Batch, CallOptions, Message, ModelSpec

Engines = Callable[..., Engine]
PROMPTS = ["", "good morning", "the quick brown fox " * 4, *(f"row {n} " * (n % 9 + 1) for n in range(29))]


def generated(engine: Any, prompts: list[str], **options: Any) -> list[tuple[str, int]]:
    """Text and tokens of each prompt by `model.generate`, one prompt at a time."""
    answers = []
    for prompt in prompts:
        text = render(engine._tokenizer, prompt, None)
        inputs = engine._tokenizer(text.text, add_special_tokens=text.add_special_tokens, return_tensors="pt")
        ids = engine._model.generate(**inputs, do_sample=False, **options)[0, inputs["input_ids"].shape[1] :]
        answers.append((engine._tokenizer.decode(ids, skip_special_tokens=True), len(ids)))
    return answers


def said(replies: list[Reply]) -> list[tuple[object, int]]:
    return [(reply.output, reply.completion_tokens) for reply in replies]


@pytest.mark.parametrize("folder", ["chat", "plain", "sliding"])
@pytest.mark.parametrize(("rows", "tokens"), [(32, 100_000), (5, 100_000), (32, 200)])
def test_greedy_answers_equal_generate(engine: Engines, folder: str, rows: int, tokens: int) -> None:
    """Whoever shares the batch, and however it is cut, every row has the answer that `generate` gives it alone."""
    model = engine("transformers", folder, max_num_seqs=rows, max_num_batched_tokens=tokens)
    expected = generated(model, PROMPTS, max_new_tokens=24)
    assert said(ask(model, PROMPTS, max_tokens=24)) == expected
    shuffled = random.Random(rows).sample(range(len(PROMPTS)), len(PROMPTS))
    assert said(ask(model, [PROMPTS[row] for row in shuffled], max_tokens=24)) == [expected[row] for row in shuffled]
    assert len({tokens for _, tokens in expected}) > 3 or folder == "sliding"  # they end at different times


@pytest.mark.parametrize("extra", [("repetition_penalty", 1.4), ("no_repeat_ngram_size", 2), ("min_new_tokens", 9)])
def test_parameters_that_read_the_prompt_do_not_see_padding(engine: Engines, extra: tuple[str, Any]) -> None:
    """Penalties count the tokens of a row's own prompt, not what fills it up beside longer ones."""
    model = engine("transformers", "chat")
    expected = generated(model, PROMPTS, max_new_tokens=16, **dict([extra]))
    assert said(ask(model, PROMPTS, max_tokens=16, extra=(extra,))) == expected


def test_finished_rows_come_before_the_batch_is_done(engine: Engines) -> None:
    """A short answer does not wait for a long one: rows come in several pieces, the shortest answers first."""
    model = engine("transformers", "chat")
    pieces = list(model.run(Batch(1, CallOptions(max_tokens=40), PROMPTS), threading.Event()))
    tokens = [max(piece.completion_tokens) for piece in pieces]
    assert len(pieces) > 3
    assert tokens == sorted(tokens)


def test_tokens_are_counted_exactly(engine: Engines) -> None:
    """Prompt tokens are the template's, answer tokens include the one that ends it."""
    model: Any = engine("transformers", "chat")
    reply = ask(model, ["good morning"], max_tokens=3, extra=(("ignore_eos", True),))[0]
    text = "<|user|>good morning<|end|><|assistant|>"
    assert reply.prompt_tokens == len(model._tokenizer(text, add_special_tokens=False)["input_ids"])
    assert (reply.completion_tokens, reply.finish_reason) == (3, "length")


def test_stop_ends_an_answer_before_the_text(engine: Engines) -> None:
    """The answer is cut before the first stop text, ends 'stop', and costs no more tokens than it took."""
    model = engine("transformers", "plain")
    free = ask(model, PROMPTS, max_tokens=24, extra=(("ignore_eos", True),))
    stop = str(free[1].output)[4:7]
    cut = ask(model, PROMPTS, max_tokens=24, stop=(stop, "\0never"), extra=(("ignore_eos", True),))
    for whole, reply in zip(free, cut, strict=True):
        before, found, _ = str(whole.output).partition(stop)
        assert reply.output == before
        assert reply.finish_reason == ("stop" if found else "length")
        assert reply.completion_tokens <= whole.completion_tokens
    assert cut[1].completion_tokens < free[1].completion_tokens


def test_stop_token_ids_and_special_tokens_end_an_answer(engine: Engines) -> None:
    """An answer ends with a token named by its number or, for a special token, by its text; neither is shown."""
    model: Any = engine("transformers", "plain")
    free = ask(model, ["good"], max_tokens=12, extra=(("ignore_eos", True),))[0]
    ids = model._tokenizer(str(free.output), add_special_tokens=False)["input_ids"]
    by_number = ask(model, ["good"], max_tokens=12, extra=(("ignore_eos", True), ("stop_token_ids", f"{ids[3]},1")))[
        0
    ]
    assert by_number.finish_reason == "stop"
    assert by_number.completion_tokens == ids.index(ids[3]) + 1
    assert str(free.output).startswith(str(by_number.output))
    assert ask(model, PROMPTS, stop=("<|end|>",), max_tokens=9) == ask(model, PROMPTS, max_tokens=9)


def test_a_seed_decides_an_answer_in_any_company(engine: Engines) -> None:
    """The same prompt and seed give the same answer alone, in a batch and twice; other seeds give others."""
    model = engine("transformers", "chat", max_num_seqs=6)
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "max_tokens": 12}
    together = ask(model, [*PROMPTS, PROMPTS[1]], seed=4, **options)
    alone = [ask(model, [prompt], seed=4, **options)[0] for prompt in PROMPTS]
    assert together == [*alone, alone[1]]
    assert ask(model, PROMPTS, seed=5, **options) != alone


def test_sampling_without_a_seed_varies(engine: Engines) -> None:
    """Equal prompts at a temperature, without a seed, are drawn each for itself."""
    replies = ask(engine("transformers", "chat"), ["good"] * 12, temperature=1.5, max_tokens=12)
    assert len({reply.output for reply in replies}) > 1


def test_sampling_follows_the_distribution(engine: Engines) -> None:
    """Over many draws the first token comes as often as the model's own probabilities say."""
    import torch

    model: Any = engine("transformers", "plain", max_num_seqs=500)
    ids = model._tokenizer("good", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        likely, token = model._model(ids).logits[0, -1].softmax(-1).max(-1)
    likeliest = model._tokenizer.decode([token])
    replies = ask(model, ["good"] * 1500, temperature=1.0, max_tokens=1)
    assert sum(reply.output == likeliest for reply in replies) / 1500 == pytest.approx(float(likely), abs=0.05)


def test_top_k_one_is_greedy(engine: Engines) -> None:
    """With top_k=1 nothing is left to chance."""
    model = engine("transformers", "chat")
    assert ask(model, PROMPTS, temperature=2.0, top_k=1, max_tokens=9) == ask(model, PROMPTS, max_tokens=9)


def test_bad_rows_get_their_errors_and_neighbours_their_answers(engine: Engines) -> None:
    """A row that cannot be asked has an error that quotes nothing of it; the rows beside it are as without it."""
    model = engine("transformers", "chat")
    bad: list[Any] = [None, "a\ud800b", (Message("wizard", "abracadabra"),), (), "long " * 500, 3]
    replies = ask(model, ["good", *bad, "morning"], max_tokens=8)
    codes = [reply.error.code if reply.error else "" for reply in replies]
    assert codes[1:-1] == [*["prompt_bad"] * 2, "template_failed", "prompt_bad", "prompt_too_long", "prompt_bad"]
    assert [replies[0], replies[-1]] == ask(model, ["good", "morning"], max_tokens=8)
    assert not any("abracadabra" in str(reply.error) for reply in replies)
    assert "unknown role" in str(replies[3].error)  # the template's own words


def test_length_guard_names_both_numbers(engine: Engines) -> None:
    """A prompt that does not fit says how long it is and what fits; max_tokens is cut only when nobody said it."""
    model = engine("transformers", "chat")
    fits = "a b " * 28
    replies = ask(model, [fits], extra=(("ignore_eos", True),))
    assert replies[0].prompt_tokens + replies[0].completion_tokens == 128
    error = ask(model, [fits], max_tokens=128)[0].error
    assert error is not None
    assert error.code == "prompt_too_long"
    assert {str(replies[0].prompt_tokens), "128"} <= set(re.findall(r"\d+", error.message))
    assert str(replies[0].completion_tokens) in str(error.hint)


def test_the_system_message_comes_first(engine: Engines) -> None:
    """A call's system message stands before a text, and a conversation keeps its own."""
    for name in ("chat", "plain"):
        model: Any = engine("transformers", name)
        assert render(model._tokenizer, "b", "a").text in ("a\nb", "<|system|>a<|end|><|user|>b<|end|><|assistant|>")
        own = (Message("system", "mine"), Message("user", "b"))
        assert ask(model, [own], system="other", max_tokens=9) == ask(model, [own], max_tokens=9)
        assert ask(model, ["b"], system="a")[0].prompt_tokens > ask(model, ["b"])[0].prompt_tokens


def test_stop_event_ends_the_work(engine: Engines) -> None:
    """Once the event is set nothing more comes, and at most one more step is made."""
    model = engine("transformers", "chat")
    stop = threading.Event()
    pieces: Iterator[Any] = model.run(Batch(1, CallOptions(max_tokens=60), PROMPTS), stop)
    next(pieces)
    stop.set()
    assert list(pieces) == []


def test_an_empty_batch_has_no_answers(engine: Engines) -> None:
    """No rows, no pieces."""
    assert ask(engine("transformers", "chat"), []) == []


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"extra": (("repetition_penalti", 1.0),)}, "option_unknown", "repetition_penalty"),
        ({"extra": (("min_new_tokens", "many"),)}, "option_value", "whole number"),
        ({"extra": (("stop_token_ids", "a"),)}, "option_value", "token ids"),
        ({"extra": (("repetition_penalty", -1.0),)}, "option_value", "penalty"),
        ({"temperature": -1.0}, "option_value", "temperature"),
        ({"temperature": 1.0, "top_p": 1.5}, "option_value", "top_p"),
        ({"temperature": 1.0, "top_k": -3}, "option_value", "top_k"),
    ],
)
def test_bad_generation_parameters_stop_the_batch(
    engine: Engines, options: dict[str, Any], code: str, words: str
) -> None:
    """A parameter that is unknown or out of its range is one error that names it or the nearest word."""
    with pytest.raises(Fatal) as raised:
        ask(engine("transformers", "chat"), ["good"], **options)
    assert raised.value.code == code
    assert words in str(raised.value)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_is_said_so(engine: Engines, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Memory that runs out in the model becomes OutOfMemory, so that the batch is halved."""
    model: Any = engine("transformers", "chat")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(type(model._model), "forward", fail)
    with pytest.raises(OutOfMemory):
        ask(model, ["good"])


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"dtyp": "float32"}, "option_unknown"),
        ({"dtype": "float23"}, "option_value"),
        ({"quantization": "4"}, "quantization_needs_gpu"),
        ({"quantization": "5"}, "option_value"),
        ({"max_num_seqs": "no"}, "option_value"),
    ],
)
def test_bad_engine_options_fail_the_deployment(engine: Engines, options: dict[str, Any], code: str) -> None:
    """An engine's option that is unknown or has no such value is an error before the model loads."""
    with pytest.raises(UserError) as raised:
        engine("transformers", "chat", **options)
    assert raised.value.code == code
    assert raised.value.hint


def test_wrong_defaults_fail_the_deployment(folders: Callable[[str], Path]) -> None:
    """A generation default that no row could use is found when the model is deployed."""
    from runtime.engines.transformers import load

    defaults = CallOptions(extra=(("nonsense", 1),))
    with pytest.raises(UserError, match="nonsense"):
        load(ModelSpec("m", "transformers", str(folders("chat")), defaults=defaults))


def test_info_says_what_was_loaded(engine: Engines) -> None:
    """The number type is the checkpoint's unless another is asked for; the length may be lowered, not raised."""
    assert engine("transformers", "chat").info.dtype == "float32"
    short = engine("transformers", "chat", dtype="bf16", max_model_len=64).info
    assert (short.dtype, short.max_model_len, short.chat_template) == ("bfloat16", 64, True)
    assert engine("transformers", "chat", max_model_len=9999).info.max_model_len == 128
