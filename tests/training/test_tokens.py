"""From rows to token ids: what is learnt, what is sent in serving, and what becomes of the others."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import models
import pytest
from written import chat, learnt, table, texts

from runtime.errors import Cancelled, UserError
from runtime.prompts.chat import render
from runtime.prompts.encoding import Encoder
from runtime.prompts.format import PromptFormat
from runtime.prompts.style import Style
from runtime.spec import Message
from runtime.training.tokenizer import train_tokenizer
from runtime.training.tokens import Prepared, TokenFile, prepare

PLAIN = PromptFormat(
    system="{instruction}\n",
    user="Q: {instruction}\n",
    assistant="A: {instruction}\n",
    trailing_assistant="A:",
    bos="<s>",
)
BLANK = PromptFormat(  # its prompts end in a blank, which a tokenizer joins with what follows
    system="{instruction} ", user="{instruction} ? ", assistant="{instruction} ", bos="<s>"
)
MARKED = PromptFormat(
    system="<|system|>{instruction}<|end|>",
    user="<|user|>{system}{instruction}<|end|>",
    assistant="<|assistant|>{instruction}<|end|>\n",
    trailing_assistant="<|assistant|>",
    system_in_user=True,
)
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% generation %}{{ m.content }}{% endgeneration %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
FORGETS = (  # as templates of models that think do: only the last answer is written out
    "{% for m in messages %}{% if m.role == 'user' %}U {{ m.content }}\n"
    "{% else %}A {% if loop.last %}(thought) {% endif %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A {% endif %}"
)
STYLES = {
    "the tokenizer's template": Style(),
    "a template without marks": Style(chat_template=CHATML),
    "a template that forgets": Style(chat_template=FORGETS),
    "plain": Style(PLAIN),
    "blank": Style(BLANK),
    "marked": Style(MARKED),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return models.text_tokenizer()


def made(tmp_path: Path, tokenizer: Any, rows: list[Any], **how: Any) -> tuple[Prepared, TokenFile]:
    how = {"style": Style(), "max_length": 512} | how
    told = prepare(table(tmp_path / "data.jsonl", rows), tmp_path / "tokens", tokenizer, **how)
    assert Prepared.read(tmp_path / "tokens") == told
    data = TokenFile(tmp_path / "tokens")
    assert (len(data), sum(map(data.length, range(len(data))))) == (told.sequences, told.tokens)
    return told, data


CONVERSATION = chat("how are you?", "fine", "and the fox?", "it jumps over the dog", system="be kind")


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("the tokenizer's template", ["fine<|end|>", "it jumps over the dog<|end|>"]),
        ("a template without marks", ["fine<|end|>\n", "it jumps over the dog<|end|>\n"]),
        ("plain", [" fine\n", " it jumps over the dog\n<|end|>"]),
        ("blank", ["fine ", "it jumps over the dog <|end|>"]),
        ("marked", ["fine<|end|>\n", "it jumps over the dog<|end|>\n"]),
    ],
)
@pytest.mark.parametrize("packing", [False, True])
def test_only_what_the_assistant_wrote_is_learnt(
    tmp_path: Path, tokenizer: Any, style: str, expected: list[str], packing: bool
) -> None:
    """All that follows the prompt, with the end mark, of every answer; nothing else. Without a mark the end token."""
    rows = [CONVERSATION, chat("good morning", "thank you"), CONVERSATION]
    _, data = made(tmp_path, tokenizer, rows, style=STYLES[style], packing=packing)
    single = [expected[-1].replace("it jumps over the dog", "thank you")]
    in_order, longest_first = [expected, single, expected], [[*expected, *expected, *single]]
    assert learnt(tokenizer, data) == (longest_first if packing else in_order)


@pytest.mark.parametrize("style", ["the tokenizer's template", "a template that forgets", "plain", "blank", "marked"])
def test_an_answer_of_weight_0_stands_there_and_is_not_learnt(tmp_path: Path, tokenizer: Any, style: str) -> None:
    """OpenAI's mark for an answer that is only there for what follows."""
    row = chat("how are you?", "fine", "and the fox?", "it jumps")
    row["messages"][1]["weight"] = 0
    _, data = made(tmp_path, tokenizer, [row], style=STYLES[style])
    assert len(data) == 1
    assert "fine" in texts(tokenizer, data)[0]
    [stretches] = learnt(tokenizer, data)
    assert len(stretches) == 1
    assert "it jumps" in stretches[0]


def test_an_answer_that_is_written_otherwise_later_is_learnt_as_it_is_asked(tmp_path: Path, tokenizer: Any) -> None:
    """One example for each answer, each behind the very prompt that serving sends."""
    told, data = made(tmp_path, tokenizer, [chat("q", "a", "r", "b")], style=STYLES["a template that forgets"])
    assert told.examples == 2
    assert texts(tokenizer, data) == ["U q\nA (thought) a<|end|>", "U q\nA a<|end|>U r\nA (thought) b<|end|>"]
    assert learnt(tokenizer, data) == [["(thought) a<|end|>"], ["(thought) b<|end|>"]]


@pytest.mark.parametrize("style", STYLES)
def test_training_and_serving_have_the_same_tokens(tmp_path: Path, tokenizer: Any, style: str) -> None:
    """The ids before each answer are those that the engine sends to ask for it, whatever is said."""
    words = [
        "fox",
        " dog",
        "\n",
        "  ",
        "{x}",
        "é",
        "日本",
        "?",
        ".",
        "the quick",
        "\n\n",
        "'s",
        "12",
        "<|end|>",
        "<s",
    ]
    random_ = random.Random(7)
    encoder = Encoder(tokenizer)
    rows = []
    for _ in range(60):
        said = ["x" + "".join(random_.choices(words, k=random_.randint(1, 4))) for _ in range(2)]
        rows.append(chat(*said, system=random_.choice([None, "be kind"])))
    _, data = made(tmp_path, tokenizer, rows, style=STYLES[style])
    assert len(data) == len(rows)
    for place, row in enumerate(rows):
        asked = tuple(Message(**turn) for turn in row["messages"][:-1])
        sent = encoder.encode([render(tokenizer, asked, None, STYLES[style])])[0].ids
        ids, labels = data[place]["input_ids"].tolist(), data[place]["labels"].tolist()
        assert ids[: len(sent)] == sent
        assert all(label == -100 for label in labels[: len(sent)])
        assert all(label != -100 for label in labels[len(sent) :])


@pytest.mark.parametrize("style", ["the tokenizer's template", "plain", "blank", "marked"])
def test_the_history_of_a_conversation_has_the_same_tokens_too(tmp_path: Path, tokenizer: Any, style: str) -> None:
    """Every answer of a long conversation stands behind the ids of its own prompt."""
    row = chat("the dog", "fox ", "12 ?", "a\nlist", "é", "{}", system="be kind")
    _, data = made(tmp_path, tokenizer, [row], style=STYLES[style])
    ids = data[0]["input_ids"].tolist()
    encoder = Encoder(tokenizer)
    turns = tuple(Message(**turn) for turn in row["messages"])
    for place in (2, 4, 6):
        sent = encoder.encode([render(tokenizer, turns[:place], None, STYLES[style])])[0].ids
        assert ids[: len(sent)] == sent


def test_offsets_without_their_blanks_lose_no_token(tmp_path: Path) -> None:
    """Some tokenizers cut blanks off their offsets; a blank that the assistant wrote is learnt all the same."""
    from tokenizers.processors import ByteLevel

    trimming = models.text_tokenizer()
    trimming.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    row = chat("q", "{x}", "r", "{y}")  # a blank before a brace is a token of its own
    _, data = made(tmp_path, trimming, [row], style=Style(PLAIN))
    assert learnt(trimming, data) == [[" {x}\n", " {y}\n<|end|>"]]


def test_a_tokenizer_without_special_tokens_will_do(tmp_path: Path) -> None:
    """Nothing ends its answers, and nothing is added."""
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=models.text_tokenizer().backend_tokenizer)
    _, data = made(tmp_path, bare, [chat("q", "a"), chat("q ", "\nb")], style=Style(BLANK))
    assert texts(bare, data) == ["<s>q ? a ", "<s>q ? b "]
    assert learnt(bare, data) == [["a "], ["b "]]


def test_a_template_that_answers_elsewhere_is_a_bad_row(tmp_path: Path, tokenizer: Any) -> None:
    """When no prompt is the beginning of its answered conversation, the error says so."""
    template = (
        "{{ messages[0].content }}{% if add_generation_prompt %}THINK{% else %}{{ messages[-1].content }}{% endif %}"
    )
    with pytest.raises(UserError) as caught:
        made(tmp_path, tokenizer, [chat("q", "a")], style=Style(chat_template=template))
    assert caught.value.code == "training_no_rows"
    assert "otherwise than the prompt" in caught.value.message
    assert not (tmp_path / "tokens").exists()


def test_plain_text_is_learnt_whole(tmp_path: Path, tokenizer: Any) -> None:
    """All but the first token, which nothing stands before; the end token closes it, once."""
    _, data = made(tmp_path, tokenizer, [{"text": "the fox"}, {"text": "the dog<|end|>"}])
    assert texts(tokenizer, data) == ["<s>the fox<|end|>", "<s>the dog<|end|>"]
    assert learnt(tokenizer, data) == [["the fox<|end|>"], ["the dog<|end|>"]]


def test_longer_examples_are_cut_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    """Cut at the end; one without any answer left is a bad row."""
    rows = [chat("q", "fox " * 50), chat("q", "fox"), chat("fox " * 50, "a")]
    whole = made(tmp_path, tokenizer, rows)[1]
    told, data = made(tmp_path, tokenizer, rows, max_length=20)
    assert [data.length(0), data.length(1)] == [20, whole.length(1)]
    assert (data[0]["input_ids"] == whole[0]["input_ids"][:20]).all()
    assert (data[0]["labels"] == whole[0]["labels"][:20]).all()
    assert (told.truncated, told.tokens_cut) == (1, whole.length(0) - 20)
    assert [(bad.row, bad.code) for bad in told.bad] == [(3, "row_too_long")]
    assert (told.rows, told.bad_rows, told.examples) == (3, 1, 2)


def test_bad_rows_are_counted_and_listed(tmp_path: Path, tokenizer: Any) -> None:
    """By their numbers, the first thousand of them; the good ones are all there."""
    bad = ["{broken", "[]", {"messages": None}, chat("q"), chat("q", ""), chat("", "a"), chat("q", "a", system=None)]
    rows = [chat("first", "a"), *bad[:-1], bad[-1], *[{"messages": None}] * 1200]
    told, data = made(tmp_path, tokenizer, rows)
    assert (told.rows, told.bad_rows, told.examples, len(data)) == (1208, 1206, 2, 2)
    codes = ["row_json", "row_json", "row_null", "row_no_answer", "row_empty", "row_empty"]
    assert [(each.row, each.code) for each in told.bad[:6]] == list(enumerate(codes, 2))
    assert len(told.bad) == 1000


def test_an_empty_question_is_fine_where_the_format_adds_nothing(tmp_path: Path, tokenizer: Any) -> None:
    """The document's Llama Guard rows: all in the system message."""
    verbatim = PromptFormat("{instruction}", "{instruction}", "{instruction}")
    told, data = made(tmp_path, tokenizer, [chat("", "safe", system="<s>is it? ")], style=Style(verbatim))
    assert told.bad_rows == 0
    assert texts(tokenizer, data) == ["<s>is it?safe<|end|>"]
    assert learnt(tokenizer, data) == [["safe<|end|>"]]


@pytest.mark.parametrize(
    ("rows", "message"), [([], "no rows"), ([{"messages": None}], "messages is NULL"), (["x"], "no rows")]
)
def test_a_table_with_nothing_to_learn_is_an_error(
    tmp_path: Path, tokenizer: Any, rows: list[Any], message: str
) -> None:
    """It is empty, or no row can be used; the first one's fault is told. Nothing is left behind."""
    with pytest.raises(UserError) as caught:
        made(tmp_path, tokenizer, rows)
    assert caught.value.code == "training_no_rows"
    assert message in caught.value.message
    assert [file.name for file in tmp_path.iterdir()] == ["data.jsonl"]


def test_packing_keeps_examples_whole_and_apart(tmp_path: Path, tokenizer: Any) -> None:
    """Every example once, unbroken; positions start again; its first token is not learnt; little room is lost."""
    random_ = random.Random(3)
    rows = [{"text": "fox " * random_.randint(1, 60)} for _ in range(400)]
    single = made(tmp_path, tokenizer, rows, max_length=128)[1]
    expected = sorted(tuple(single[place]["input_ids"].tolist()) for place in range(len(single)))
    told, data = made(tmp_path, tokenizer, rows, max_length=128, packing=True)
    found = []
    for place in range(len(data)):
        row = data[place]
        assert len(row["input_ids"]) <= 128
        starts = [*(row["position_ids"] == 0).nonzero()[0].tolist(), len(row["input_ids"])]
        assert (row["labels"][starts[:-1]] == -100).all()
        for start, end in pairwise(starts):
            assert row["position_ids"][start:end].tolist() == list(range(end - start))
            found.append(tuple(row["input_ids"][start:end].tolist()))
    assert sorted(found) == expected
    assert told.packing_efficiency > 0.97
    assert "position_ids" not in single[0]


def test_documents_are_joined_and_cut_into_blocks(tmp_path: Path, tokenizer: Any) -> None:
    """Pretraining: nothing is lost, every block but the last is full, and documents end with the end token."""
    rows = [{"text": f"row {number} " + "the fox " * (number % 50)} for number in range(1, 80)]
    told, data = made(tmp_path, tokenizer, rows, max_length=64, blocks=True, packing=True)
    assert {data.length(place) for place in range(len(data) - 1)} == {64}
    assert 0 < data.length(len(data) - 1) <= 64
    joined = [id_ for place in range(len(data)) for id_ in data[place]["input_ids"].tolist()]
    assert tokenizer.decode(joined) == "".join(f"<s>{row['text']}<|end|>" for row in rows)
    assert told.loss_tokens == told.tokens
    assert set(data[0]) == {"input_ids", "labels"}
    assert (told.truncated, told.examples) == (0, 79)


def test_a_very_long_text_is_tokenised_in_parts(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is lost, and it begins and ends once."""
    monkeypatch.setattr("runtime.training.tokens.MAX_TEXT_CHARS", 100)
    rows = [{"text": "the quick fox\n" * 40 + "x" * 250 + " end"}, {"text": "short"}]
    _, data = made(tmp_path, tokenizer, rows, max_length=4096)
    assert texts(tokenizer, data) == [f"<s>{row['text']}<|end|>" for row in rows]


def test_equal_rows_give_equal_files(tmp_path: Path, tokenizer: Any) -> None:
    """Byte for byte, also from several files."""
    random_ = random.Random(1)
    rows = [chat("fox " * random_.randint(1, 9), "dog " * random_.randint(1, 9)) for _ in range(300)]
    contents = []
    for parts in (1, 1, 3):
        files = [
            table(tmp_path / f"{parts}-{part}.jsonl", rows[part * 300 // parts :][: 300 // parts])[0]
            for part in range(parts)
        ]
        prepare(files, tmp_path / "out", tokenizer, style=Style(), max_length=64, packing=True, window=128)
        contents.append({file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()})
    assert contents[0] == contents[1] == contents[2]


def test_a_cancelled_preparation_leaves_nothing(tmp_path: Path, tokenizer: Any) -> None:
    """It is asked between batches, and the folder does not appear."""
    answers = iter([False, False, True])
    seen: list[Prepared] = []
    rows = table(tmp_path / "data.jsonl", [chat("q", "a")] * 5000)
    with pytest.raises(Cancelled):
        prepare(
            rows, tmp_path / "out", tokenizer, style=Style(), max_length=64, stop=lambda: next(answers), progress=seen.append
        )  # fmt: skip
    assert [told.rows for told in seen] == [1000, 2000]
    assert [file.name for file in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_token_file_travels_between_processes(tmp_path: Path, tokenizer: Any) -> None:
    """Pickled after it was read; by index from both ends; outside it an IndexError."""
    _, data = made(tmp_path, tokenizer, [chat("q", "a"), chat("r", "b")])
    first = data[0]
    again: TokenFile = pickle.loads(pickle.dumps(data))
    assert (again[-2]["input_ids"] == first["input_ids"]).all()
    for place in (2, -3):
        with pytest.raises(IndexError):
            data[place]


_STREAM = """
import json, sys
from pathlib import Path
import psutil
sys.path[:0] = {paths!r}
import models
from runtime.prompts.style import Style
from runtime.training.tokens import TokenFile, prepare
folder, used = Path(sys.argv[1]), []
with (folder / "data.jsonl").open("w") as stream:
    for number in range(200_000):
        stream.write(json.dumps({{"text": f"row {{number}} the quick brown fox"}}) + "\\n")
def measure(_=None):
    used.append(psutil.Process().memory_info().rss >> 20)
told = prepare([folder / "data.jsonl"], folder / "out", models.text_tokenizer(), style=Style(), max_length=512,
               packing=True, progress=measure)
data = TokenFile(folder / "out")
assert sum(len(data[place]["input_ids"]) for place in range(len(data))) == told.tokens
measure()
print(told.rows, len(used), max(used) - max(used[:20]))
"""


def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    """200,000 rows need what the first 20,000 need, give or take 24 MB, and so does reading them."""
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    script = [sys.executable, "-c", _STREAM.format(paths=paths), str(tmp_path)]
    said = subprocess.run(script, check=True, capture_output=True, text=True).stdout.split()
    assert said[:2] == ["200000", "201"]
    assert int(said[2]) < 24


def test_a_tokenizer_is_trained_from_the_table(tmp_path: Path) -> None:
    """AutoTokenizer loads it as it was; it spells anything, ends with its end token, and separates the roles."""
    from transformers import AutoTokenizer, LlamaConfig

    rows = table(tmp_path / "data.jsonl", [chat(f"how many foxes are {n}?", "just as many") for n in range(200)])
    trained = train_tokenizer(rows, 320, tmp_path / "tokenizer")
    LlamaConfig(vocab_size=len(trained)).save_pretrained(tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    assert len(loaded) <= 320
    for text in ("how many foxes", "日本 é\n\t{}", "1234"):
        ids = loaded(text)["input_ids"]
        assert ids == trained(text)["input_ids"]
        assert loaded.decode(ids) == "<s>" + text
    assert len(loaded("many foxes", add_special_tokens=False)["input_ids"]) < 6
    assert len(loaded("1234", add_special_tokens=False)["input_ids"]) == 4
    again = train_tokenizer(rows, 320, tmp_path / "again")
    assert again.get_vocab() == trained.get_vocab()
    _, data = made(tmp_path, loaded, [chat("q", "a", "r", "b")])
    assert texts(loaded, data) == ["<s><|user|>q<|end|><|assistant|>a<|end|><|user|>r<|end|><|assistant|>b<|end|>"]
    assert learnt(loaded, data) == [["a<|end|>", "b<|end|>"]]


def test_a_trained_tokenizer_knows_the_marks_of_the_format(tmp_path: Path) -> None:
    """Each is one token, and the one that ends answers is the end token; plain texts give no chat template."""
    said = PromptFormat("<|sys|>{instruction}", "[INST]{instruction}[/INST]", "{instruction}</s>", bos="<|begin|>")
    rows = table(tmp_path / "data.jsonl", [{"text": "the quick brown fox"}] * 3)
    made_ = train_tokenizer(rows, 300, tmp_path / "tokenizer", style=Style(said))
    assert (made_.bos_token, made_.eos_token, made_.chat_template) == ("<|begin|>", "</s>", None)
    assert len(made_("<|sys|>[INST][/INST]</s>", add_special_tokens=False)["input_ids"]) == 4
    assert train_tokenizer(rows, 300, tmp_path / "tokenizer").chat_template is None
    with pytest.raises(UserError) as caught:
        train_tokenizer(rows, 100, tmp_path / "small")
    assert caught.value.code == "option_value"
