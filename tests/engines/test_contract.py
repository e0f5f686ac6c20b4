"""What every engine that generates text keeps to, whatever computes the tokens. One line in ENGINES for each."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import models
import pytest
import torch
from asking import Reply, ask
from transformers import AutoModelForCausalLM, AutoTokenizer

from runtime.engines import Engine, loader
from runtime.errors import Fatal
from runtime.prompts.chat import render
from runtime.spec import Batch, CallOptions, Message, ModelSpec


class Kind(NamedTuple):
    """An engine, the package that it needs, and its options for float32."""

    engine: str
    package: str
    options: tuple[tuple[str, Any], ...] = ()


ENGINES = [
    Kind("transformers", "transformers"),
    Kind("openvino", "openvino_genai", (("dtype", "float32"),)),
    Kind("vllm", "vllm", (("dtype", "float32"), ("enforce_eager", True), ("kv_cache_memory_bytes", 2**28))),
    Kind("llama_cpp", "llama_cpp"),
]
PROMPTS = ["", "good morning", "the quick brown fox " * 4, *(f"row {n} " * (n % 9 + 1) for n in range(21))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that answers at different lengths."""
    return models.language_model(
        tmp_path_factory.mktemp("contract") / "chat", eos_bias=1.5, max_model_len=128, head_dim=32
    )


@pytest.fixture(scope="module")
def reference(folder: Path) -> Callable[..., list[tuple[str, int]]]:
    """Text and tokens of each prompt by `model.generate`, one prompt at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def generated(prompts: list[str], **options: Any) -> list[tuple[str, int]]:
        answers = []
        for prompt in prompts:
            text = render(tokenizer, prompt, None)
            inputs = tokenizer(text.text, add_special_tokens=text.add_special_tokens, return_tensors="pt")
            with torch.inference_mode():
                ids = model.generate(**inputs, do_sample=False, **options)[0, inputs["input_ids"].shape[1] :]
            answers.append((tokenizer.decode(ids, skip_special_tokens=True), len(ids)))
        return answers

    return generated


@pytest.fixture(scope="module", params=ENGINES, ids=lambda kind: kind.engine)
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    """The engine, loaded once; skipped where its package is not installed."""
    kind: Kind = request.param
    if not find_spec(kind.package):
        pytest.skip(f"{kind.package} is not installed")
    loaded = loader(kind.engine)(ModelSpec("m", kind.engine, str(folder), options=tuple(sorted(kind.options))))
    yield loaded
    loaded.close()


def said(replies: list[Reply]) -> list[tuple[object, int]]:
    return [(reply.output, reply.completion_tokens) for reply in replies]


def test_greedy_answers_are_those_of_generate(engine: Engine, reference: Callable[..., Any]) -> None:
    """In float32, whoever shares the batch and in whatever order, every row has the answer it has alone."""
    expected = reference(PROMPTS, max_new_tokens=24)
    assert said(ask(engine, PROMPTS, max_tokens=24)) == expected
    order = random.Random(1).sample(range(len(PROMPTS)), len(PROMPTS))
    assert said(ask(engine, [PROMPTS[row] for row in order], max_tokens=24)) == [expected[row] for row in order]
    assert len({tokens for _, tokens in expected}) > 3


def test_a_long_beginning_that_rows_share_changes_nothing(engine: Engine, reference: Callable[..., Any]) -> None:
    """What an engine keeps of prompts that begin alike is not seen in the answers."""
    prompts = [f"{'the quick brown fox jumps ' * 6}{n}" for n in range(6)]
    assert said(ask(engine, prompts, max_tokens=9)) == reference(prompts, max_new_tokens=9)


def test_bad_rows_have_their_errors(engine: Engine) -> None:
    """A row that cannot be asked has its error, and the rows beside it are as without it."""
    bad: list[Any] = [None, "a\ud800b", (Message("wizard", "abracadabra"),), (), "long " * 500]
    replies = ask(engine, ["good", *bad, "morning"], max_tokens=8)
    codes = [reply.error.code if reply.error else "" for reply in replies]
    assert codes == ["", "prompt_bad", "prompt_bad", "template_failed", "prompt_bad", "prompt_too_long", ""]
    assert [replies[0], replies[-1]] == ask(engine, ["good", "morning"], max_tokens=8)
    assert not any("abracadabra" in str(reply.error) for reply in replies)


def test_max_tokens_is_kept_and_counted(engine: Engine) -> None:
    """An answer that is cut says so; its tokens, and those of its prompt, are counted exactly."""
    batch = Batch(1, CallOptions(), PROMPTS)
    replies = ask(engine, PROMPTS, max_tokens=5, extra=(("ignore_eos", True),))
    assert {(reply.finish_reason, reply.completion_tokens) for reply in replies} == {("length", 5)}
    assert [reply.prompt_tokens for reply in replies] == engine.count_tokens(batch)


def test_without_max_tokens_the_model_is_filled(engine: Engine) -> None:
    """max_tokens is cut to the model's room only when nobody said it."""
    reply = ask(engine, ["a b " * 28], extra=(("ignore_eos", True),))[0]
    assert reply.prompt_tokens + reply.completion_tokens == 128
    error = ask(engine, ["a b " * 28], max_tokens=128)[0].error
    assert error is not None
    assert error.code == "prompt_too_long"


def test_a_stop_text_ends_an_answer(engine: Engine) -> None:
    """The answer ends before the stop text, with the reason 'stop', and costs no more tokens than it took."""
    free = ask(engine, PROMPTS, max_tokens=20)
    stop = next(str(reply.output)[3:6] for reply in free if len(str(reply.output)) > 8)
    for whole, reply in zip(free, ask(engine, PROMPTS, max_tokens=20, stop=(stop,)), strict=True):
        before, found, _ = str(whole.output).partition(stop)
        assert reply.output == before
        assert reply.finish_reason == ("stop" if found else whole.finish_reason)
        assert reply.completion_tokens <= whole.completion_tokens


def test_a_seed_decides_an_answer(engine: Engine) -> None:
    """The same prompt and seed give the same answer alone and in a batch; another seed, or none, gives others."""
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 12}
    together = ask(engine, PROMPTS[:8], seed=4, **options)
    assert said(together) == said([ask(engine, [prompt], seed=4, **options)[0] for prompt in PROMPTS[:8]])
    assert said(ask(engine, PROMPTS[:8], seed=5, **options)) != said(together)
    assert len({reply.output for reply in ask(engine, ["good"] * 8, temperature=1.5, max_tokens=12)}) > 1


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"extra": (("repetition_penalti", 1.0),)}, "option_unknown", "repetition_penalty"),
        ({"extra": (("repetition_penalty", "much"),)}, "option_value", "number"),
        ({"temperature": -1.0}, "option_value", "temperature"),
        ({"temperature": 1.0, "top_p": 1.5}, "option_value", "top_p"),
    ],
)
def test_bad_parameters_stop_the_batch(engine: Engine, options: dict[str, Any], code: str, words: str) -> None:
    """A parameter that is unknown or out of its range is one error in the same words."""
    with pytest.raises(Fatal) as raised:
        ask(engine, ["good"], **options)
    assert raised.value.code == code
    assert words in str(raised.value)


def test_a_stopped_batch_ends_and_the_next_is_answered(engine: Engine) -> None:
    """Once the event is set nothing more comes; the engine goes on with the next batch."""
    stop = threading.Event()
    options = CallOptions(max_tokens=60, extra=(("ignore_eos", True),))
    rest = engine.run(Batch(1, options, ["a", *["row"] * 40]), stop)
    stop.set()
    assert sum(len(piece.rows) for piece in rest) < 41  # type: ignore[union-attr]
    assert ask(engine, ["good"], max_tokens=3)[0].error is None


def test_several_batches_at_once(engine: Engine) -> None:
    """Batches in flight together have the answers that each has alone."""
    expected = [said(ask(engine, PROMPTS[n::3], max_tokens=12)) for n in range(3)]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: said(ask(engine, PROMPTS[n::3], max_tokens=12))}))
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(3)] == expected
