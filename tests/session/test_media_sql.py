"""Models of images, sound and pairs from SQL: BLOBs and paths in, BLOBs and texts out."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import media_models as media
import pytest
import soundfile
from PIL import Image

import sqlext
from runtime.errors import Fatal

Deploy = Callable[..., None]
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("media")
    return {
        "rank": media.reranker(root / "rank"),
        "see": media.vision(root / "see"),
        "hear": media.whisper(root / "hear"),
        "say": media.vits(root / "say"),
        "draw": media.stable_diffusion(root / "draw"),
    }


def calls_of(con: sqlext.Connection, model: str) -> int:
    return con.execute("SELECT coalesce(sum(calls), 0)::INT FROM llm_calls WHERE model = ?", [model]).fetchone()[0]


def test_a_reranker_scores_pairs(con: sqlext.Connection, deploy: Deploy, folders: dict[str, Path]) -> None:
    """rerank(query, text) is a DOUBLE; equal pairs are asked once; NULL in either gives NULL without a call."""
    deploy(folders["rank"], "rerank", pretrainedModelType="custom/bge_rerank")
    rows = con.execute(
        "SELECT text, rerank('the fox', text) AS score FROM (VALUES ('a dog'), ('a list'), ('a dog'), (NULL)) t(text)"
    ).fetchall()
    assert rows[0] == rows[2]
    assert rows[0][1] != rows[1][1]
    assert rows[3] == (None, None)
    assert calls_of(con, "rerank") == 2
    assert con.execute("SELECT rerank(NULL, 'x'), typeof(rerank('a', 'b'))").fetchone() == (None, "DOUBLE")
    best = con.execute(
        "SELECT text FROM (VALUES ('a dog'), ('a list')) t(text) ORDER BY rerank('the fox', text) DESC LIMIT 1"
    ).fetchone()
    assert best == max(rows[:2], key=lambda row: row[1])[:1]
    assert con.execute("SELECT rerank_row('a', 'b').prompt_tokens").fetchone() == (5,)
    explained = con.execute("EXPLAIN LLM SELECT rerank('new', text) FROM (VALUES ('a'), ('b'), ('a')) t(text)").df()
    assert explained[["rows", "calls"]].to_numpy().tolist() == [[3, 2]]


def test_an_image_is_a_blob_or_a_path(
    con: sqlext.Connection, deploy: Deploy, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The same image has the same answer as BLOB, as path and in a list; it belongs to its content."""
    deploy(folders["see"], "see", pretrainedModelType="custom/qwen_vl_chat")
    one, two = media.picture(1), media.picture(2)
    path = tmp_path / "one.png"
    path.write_bytes(one)
    ask = "SELECT see('what is this', max_tokens := 6, image := {})"
    blob = con.execute(ask.format("?::BLOB"), [one]).fetchone()
    assert con.execute(ask.format("?"), [str(path)]).fetchone() == blob
    assert con.execute(ask.format("[?::BLOB]"), [one]).fetchone() == blob
    assert calls_of(con, "see") == 1  # the content is what counts
    other = con.execute(ask.format("?::BLOB"), [two]).fetchone()
    assert other != blob
    assert con.execute("SELECT see('what is this', max_tokens := 6)").fetchone() not in (blob, other)
    path.write_bytes(two)
    assert con.execute(ask.format("?"), [str(path)]).fetchone() == other
    messages = "[{'role': 'user', 'content': 'what is this'}]"
    assert con.execute(f"SELECT see({messages}, max_tokens := 6, image := ?::BLOB)", [one]).fetchone() == blob
    both = con.execute(
        "SELECT see_row('compare', max_tokens := 2, image := [?::BLOB, ?::BLOB])", [one, two]
    ).fetchone()
    assert both[0]["error"] is None


def test_images_of_a_table_fail_and_are_null_by_row(
    con: sqlext.Connection, deploy: Deploy, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NULL image gives NULL without a call; a bad one, a missing file and one outside the roots are row errors."""
    deploy(folders["see"], "see")
    con.execute("CREATE TABLE pictures AS SELECT 1 AS id, ?::BLOB AS image", [media.picture(1)])
    con.execute("INSERT INTO pictures VALUES (2, NULL), (3, 'no image'::BLOB)")
    rows = con.execute(
        "SELECT id, see_row('x', max_tokens := 2, image := image) AS r FROM pictures ORDER BY id"
    ).fetchall()
    assert rows[0][1]["error"] is None
    assert rows[1][1] is None
    assert rows[2][1]["error"].startswith("image_bad")
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside.png").write_bytes(media.picture(1))
    (tmp_path / "inside" / "a.png").write_bytes(media.picture(1))
    monkeypatch.setenv("SQLEXT_ROOTS", str(tmp_path / "inside"))
    paths = [str(tmp_path / name) for name in ("inside/a.png", "inside/b.png", "outside.png", "inside")]
    found = con.execute(
        "SELECT see_row('x', max_tokens := 2, image := path).error FROM (SELECT unnest(?) AS path)", [paths]
    ).fetchall()
    assert [error and error[0].split(":")[0] if error[0] else None for error in found] == [
        None,
        "media_missing",
        "media_outside_roots",
        "media_path",
    ]
    assert "outside.png" not in str(found)


def test_texts_become_images(con: sqlext.Connection, deploy: Deploy, folders: dict[str, Path]) -> None:
    """draw(…) is a PNG, draw_all(…) several; with a seed they are kept, without one every row has its own."""
    deploy(folders["draw"], "draw", pretrainedModelType="custom/stable_diffusion", **{"generation.sampling_steps": 2})
    con.execute("CREATE TABLE drawn AS SELECT i, draw('a fox', seed := 3, width := 24) AS image FROM range(3) r(i)")
    assert con.execute("SELECT count(DISTINCT image), typeof(any_value(image)) FROM drawn").fetchone() == (1, "BLOB")
    (image,) = con.execute("SELECT image FROM drawn LIMIT 1").fetchone()
    assert image.startswith(PNG)
    assert Image.open(io.BytesIO(image)).size == (24, 24)
    several = con.execute("SELECT draw_all('a fox', seed := 3, width := 24, batch_size := 2)").fetchone()[0]
    assert len(several) == 2
    assert several[0] == image != several[1]
    con.execute("SELECT draw_all('a fox', seed := 3, width := 24, batch_size := 2)").fetchall()
    assert calls_of(con, "draw") == 2
    assert con.execute("SELECT count(DISTINCT draw('a fox')) FROM range(3)").fetchone() == (3,)
    assert con.execute("SELECT draw(NULL)").fetchone() == (None,)
    changed = con.execute(
        "SELECT draw('a fox', seed := 3, image := ?::BLOB, strength := 0.5)", [media.picture(1, 16, 16)]
    )
    assert changed.fetchone()[0].startswith(PNG)
    with pytest.raises(Fatal, match="sampler_name"):
        con.execute("SELECT draw('a fox', sampler_name := 'eulers')").fetchall()
    assert con.execute("SELECT count(*) FROM llm_results WHERE model = 'draw'").fetchone()[0] >= 2


def test_what_is_spoken_can_be_heard(
    con: sqlext.Connection, deploy: Deploy, folders: dict[str, Path], tmp_path: Path
) -> None:
    """speech goes into a table as WAV, and out of it as text; a path of the same file is the same recording."""
    deploy(folders["say"], "say")
    deploy(folders["hear"], "hear", pretrainedModelType="custom/whisper")
    con.execute(
        "CREATE TABLE spoken AS SELECT text, say(text, seed := 1) AS sound FROM (VALUES ('hello'), (NULL)) t(text)"
    )
    sound = con.execute("SELECT sound FROM spoken WHERE text = 'hello'").fetchone()[0]
    assert soundfile.info(io.BytesIO(sound)).samplerate == media.RATE
    heard = con.execute("SELECT hear(sound, max_tokens := 4, language := 'en') FROM spoken ORDER BY text").fetchall()
    assert isinstance(heard[0][0], str)
    assert heard[1] == (None,)
    path = tmp_path / "hello.wav"
    path.write_bytes(sound)
    assert con.execute("SELECT hear(?, max_tokens := 4, language := 'en')", [str(path)]).fetchone() == heard[0]
    assert calls_of(con, "hear") == 1
    assert con.execute("SELECT hear_row('x'::BLOB).error").fetchone()[0].startswith("recording_bad")
