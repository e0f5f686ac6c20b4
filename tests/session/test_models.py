"""The main job: a script deploys a real checkpoint on Ray workers and queries it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import models
import numpy as np
import psutil
import pyarrow as pa
import pytest

import sqlext
from runtime import cluster
from runtime.errors import DeployError, Fatal, UserError

PROMPTS = [("fox " * (i * 7 % 23) + f"number {i}").strip() for i in range(40)]


def workers(name: str) -> list[int]:
    """Process ids of the workers of a deployed model."""
    return [worker.pid for info in cluster.deployments() if info.name == name for worker in info.workers if worker]


def greedy(folder: Path, prompts: list[str], max_tokens: int) -> list[str]:
    """What plain transformers answers to each prompt alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    answers = []
    for prompt in prompts:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            made = model.generate(**ids, do_sample=False, max_new_tokens=max_tokens)
        answers.append(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def test_greedy_text_equals_plain_transformers(con, deploy, checkpoints):
    """Token by token the same as model.generate, for every row of a table in batches on two workers."""
    deploy(checkpoints["chat"], "chat", "num_workers=2")
    con.register("questions", pa.table({"id": range(len(PROMPTS)), "q": PROMPTS}))
    rows = con.execute("SELECT chat(q, max_tokens := 24) FROM questions ORDER BY id").fetchall()
    assert [answer for (answer,) in rows] == greedy(checkpoints["chat"], PROMPTS, 24)


def test_embeddings_equal_sentence_transformers(con, deploy, checkpoints):
    """MiniLM's vectors through SQL are those of SentenceTransformer.encode within 1e-5."""
    from sentence_transformers import SentenceTransformer

    deploy(checkpoints["minilm"], "embed")
    texts = [f"text {i}: " + "a table of values " * (i % 13) for i in range(60)]
    con.register("texts", pa.table({"id": range(60), "t": texts}))
    vectors = con.execute("SELECT embed(t) AS v FROM texts ORDER BY id").arrow()["v"].combine_chunks()
    ours = vectors.flatten().to_numpy().reshape(60, -1)
    theirs = SentenceTransformer(str(checkpoints["minilm"]), device="cpu").encode(texts)
    assert ours.shape == (60, 384)
    assert np.abs(ours - theirs).max() < 1e-5
    nearest = con.execute(
        "SELECT w FROM (VALUES ('a cat'), ('a car'), ('a sum of money')) t(w) "
        "ORDER BY array_cosine_similarity(embed(w), embed('kitten')) DESC LIMIT 1"
    ).fetchone()
    assert nearest == ("a cat",)


def test_a_classifier_answers_with_label_and_score(con, deploy, checkpoints):
    """clf(text) is a STRUCT that SQL can take apart, group and filter."""
    deploy(checkpoints["classifier"], "clf")
    rows = con.execute(
        "SELECT clf('good morning').label, clf('good morning').score BETWEEN 0 AND 1, clf(NULL)"
    ).fetchall()
    assert rows[0][0] in models.LABELS
    assert rows[0][1:] == (True, None)


def reserved(expected: dict[str, float]) -> dict[str, float]:
    """What is reserved on the cluster of the expected resources; Ray's books are late, so `expected` is waited for."""
    deadline = time.monotonic() + 20
    while True:
        free = cluster.free()
        found = {name: round(free.total[name] - free.available.get(name, 0.0), 3) for name in expected}
        if found == expected or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def test_workers_take_the_resources_they_are_given(con, deploy, checkpoints):
    """Fractional GPUs, CPUs and custom resources are reserved, and free again after removal."""
    nothing = {"GPU": 0.0, "CPU": 0.0, "master": 0.0}
    taken = {"GPU": 1.0, "CPU": 0.5, "master": 0.2}
    assert reserved(nothing) == nothing
    deploy(
        checkpoints["encoder"],
        "emb",
        "num_workers=2",
        "gpus_per_worker=0.5",
        "cpus_per_worker=0.25",
        "resource.master=0.1",
        "worker_concurrency=2",
        "load_balance=round_robin",
    )
    assert reserved(taken) == taken
    assert con.execute("SELECT count(emb('t' || i)) FROM range(3000) t(i)").fetchone() == (3000,)
    assert con.execute('!llm status "emb"').df()["rows"].min() > 0
    con.execute('!llm model remove "emb"')
    assert reserved(nothing) == nothing


def test_deploy_time_defaults_and_call_options(con, deploy, checkpoints):
    """generation.* are defaults that a call overrides; the system message and stop texts arrive."""
    deploy(checkpoints["chat"], "chat", **{"generation.max_tokens": 3})
    counts = con.execute(
        "SELECT chat_row('a', system := 'S').completion_tokens, chat_row('a', max_tokens := 5).completion_tokens"
    ).fetchone()
    assert counts[0] <= 3
    assert counts[1] <= 5
    with pytest.raises(UserError, match="temperature must be"):
        deploy(checkpoints["chat"], "chat", **{"generation.temperature": "hot"})


def test_too_long_a_prompt_is_an_error_of_its_row(con, deploy, checkpoints):
    """The row names both numbers; its neighbours are answered; llm_errors lists it without its text."""
    deploy(checkpoints["chat"], "chat")
    rows = con.execute(
        "SELECT chat_row(p, max_tokens := 4) FROM (VALUES ('short'), (repeat('long word ', 2000)), ('also short')) t(p)"
    ).fetchall()
    errors = [row["error"] for (row,) in rows]
    assert errors[0] is None
    assert errors[2] is None
    assert errors[1].startswith("prompt_too_long")
    assert "512" in errors[1]
    con.execute("SELECT chat(repeat('long word ', 2000))").fetchall()
    listed = con.execute("SELECT model, code, message FROM llm_errors").fetchall()
    assert [(model, code) for model, code, _ in listed] == [("chat", "prompt_too_long")]
    assert "long word" not in listed[0][2]
    assert any("1 row failed" in notice for notice in con.session.notices)
    con.execute('!llm setup "on_error=fail"')
    with pytest.raises(Fatal, match="A row failed"):
        con.execute("SELECT chat(repeat('long word ', 2001))").fetchall()


@pytest.mark.parametrize("kind", sorted(models.BROKEN))
def test_a_broken_checkpoint_is_one_short_message(con, deploy, tmp_path, kind):
    """Every kind of bad folder: at most six lines with a hint; nothing is registered, no process is left."""
    folder = models.placeholder(tmp_path / "model")
    models.BROKEN[kind][1](folder)
    before = len(cluster.deployments())
    with pytest.raises((UserError, DeployError)) as caught:
        deploy(folder, "broken")
    lines = str(caught.value).splitlines()
    assert len(lines) <= 6
    assert caught.value.hint
    assert len(cluster.deployments()) == before
    with pytest.raises(duckdb.CatalogException):
        con.execute("SELECT broken('x')")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["num_workers=64", "cpus_per_worker=1"], "64"),
        (["gpus_per_worker=9"], "GPU"),
        (["resource.tpu=1"], "tpu"),
        (["load_balance=prefixx"], "prefix"),
        (["infer_backend=vlm"], "engine"),
        (["num_wokers=2"], "num_workers"),
        (["num_workers=0"], "1 or more"),
    ],
)
def test_what_cannot_be_placed_or_is_misspelt_is_said_at_once(con, deploy, checkpoints, settings, message):
    """More than the cluster has, or a wrong word: an error at once, never a hang, nothing registered."""
    started = time.monotonic()
    with pytest.raises((UserError, DeployError), match=message):
        deploy(checkpoints["encoder"], "m", *settings)
    assert time.monotonic() - started < 20
    assert con.execute('!llm model exists "m"').fetchone() == (False,)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ('RUN command AS LLM.`{path}` WHERE action="infer"', "udfName"),
        ('RUN command AS LLM.`{path}` WHERE action="infer" AND udfName="1 bad"', "no name for a function"),
        ('RUN command AS LLM.`{path}` WHERE action="infer" AND udfName="lower"', "already a function"),
        ('RUN command AS LLM.`{path}` WHERE action="infer" AND udfName="llm_result"', "already a function"),
        ('RUN command AS LLM.`{path}` WHERE action="infer" AND udfName="select"', "word of SQL"),
        ('RUN command AS LLM.`{path}` WHERE acton="infer" AND udfName="m"', "action"),
        ('RUN t AS LLM.`{path}` WHERE action="infer" AND udfName="m"', "takes no table"),
        ('!llm setup "infer_backend=echoo"', "echo"),
        ('RUN command AS LLM.`` WHERE action="infer" AND udfName="m"', "names no checkpoint"),
        (
            'RUN command AS LLM.`{path}` WHERE action="infer" AND udfName="m" AND pretrainedModelType="custom/lama2"',
            "llama2",
        ),
        (
            'RUN command AS LLM.`{path}` WHERE action="infer" AND udfName="m" AND pretrainedModelType="saas/zhipu"',
            "not available",
        ),
        (
            'RUN command AS LLM.`{path}` WHERE action="infer" AND udfName="m" AND pretrainedModelType="custom/llama2"',
            "embed|generat",
        ),
        ('RUN command AS LLM.`{path}` WHERE action="inferr" AND udfName="m"', "infer"),
        ('RUN command AS LLM.`{path}` WHERE action="serve"', "not available"),
        ('RUN command AS LLM.`{path}` WHERE action="infer" AND udfNam="m"', "udfName"),
        ('RUN command AS LLM.`` WHERE action="infer" AND udfName="nobody" AND reconnect="true"', "No model"),
        ("EXPLAIN LLM DROP TABLE t", "no query"),
        ("!llm modles", "models"),
    ],
)
def test_statements_that_cannot_be_done_say_why(con, checkpoints, statement, message):
    """A bad name, path, type or action is one clear error with what to do."""
    with pytest.raises(UserError, match=message) as caught:
        con.execute(statement.format(path=checkpoints["encoder"]))
    assert caught.value.hint
    assert cluster.exists("m") is False


def test_exists_models_status_and_remove_are_true(con, deploy, checkpoints):
    """What the statements say is so; after remove the processes and the function are gone."""
    deploy(checkpoints["encoder"], "emb", "num_workers=2")
    pids = workers("emb")
    con.execute("SELECT emb('a')").fetchall()
    assert con.execute('!llm model exists "emb"').fetchall() == [(True,)]
    listed = con.execute("!llm models").df().set_index("model").loc["emb"]
    assert (listed["state"], listed["task"], listed["workers"], listed["registered"]) == ("ready", "embed", 2, True)
    status = con.execute('!llm status "emb"').df()
    assert sorted(status["pid"]) == sorted(pids)
    assert status["rows"].sum() >= 1
    assert (status["memory_mb"] > 0).all()
    assert con.execute('!llm model remove "emb"').fetchall() == [(True,)]
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert con.execute('!llm model exists "emb"').fetchall() == [(False,)]
    assert con.execute('!llm model remove "EMB"').fetchall() == [(False,)]
    with pytest.raises(Fatal, match='no model behind "emb"'):
        con.execute("SELECT emb('a')").fetchall()


def test_redeploying_swaps_without_a_failing_call(con, deploy, checkpoints):
    """Calls from another thread go on while a name is deployed again; the old processes are gone afterwards."""
    deploy(checkpoints["encoder"], "emb")
    old = workers("emb")
    failures: list[BaseException] = []
    counts: list[int] = []
    over = threading.Event()

    def ask() -> None:
        cursor = con.cursor()
        number = 0
        while not over.is_set():
            number += 1
            try:
                counts.append(
                    cursor.execute(f"SELECT count(emb('q{number}-' || i)) FROM range(20) t(i)").fetchone()[0]
                )
            except BaseException as error:
                failures.append(error)
                break
        cursor.close()

    thread = threading.Thread(target=ask)
    thread.start()
    while not counts:
        time.sleep(0.01)
    deploy(checkpoints["encoder"], "emb")
    after = len(counts)
    while len(counts) < after + 3 and not failures:
        time.sleep(0.01)
    over.set()
    thread.join()
    assert not failures
    assert set(counts) == {20}
    assert not set(old) & set(workers("emb"))
    assert not any(psutil.pid_exists(pid) for pid in old)


def test_names_that_are_taken_are_refused_before_anything_is_deployed(con, deploy, checkpoints):
    """A user's macro, and the _row form of a model, keep their names; no worker is left."""
    con.execute("CREATE MACRO bot(x) AS x")
    deploy(checkpoints["encoder"], "emb")
    for name in ("bot", "emb_row"):
        with pytest.raises(UserError, match="already a function"):
            deploy(checkpoints["encoder"], name)
        assert not cluster.exists(name)
    deploy(checkpoints["encoder"], "EMB")
    assert con.execute("SELECT Emb('a') IS NOT NULL").fetchone() == (True,)


def test_save_and_set_run_like_queries(con, deploy, checkpoints, tmp_path):
    """A model call inside SAVE or SET … type="sql" has its errors, its usage and its functions, on a new cursor too."""
    deploy(checkpoints["chat"], "chat")
    cursor = con.cursor()
    cursor.execute("SET n='SELECT chat_row(''a'').prompt_tokens' WHERE type=\"sql\"")
    assert int(con.session.variables["n"]) > 0
    cursor.execute(f"CREATE VIEW v AS SELECT chat('b', max_tokens := 2) AS a; SAVE v AS json.`{tmp_path}/v.json`")
    assert (tmp_path / "v.json").exists()
    con.execute('!llm setup "on_error=fail"')
    with pytest.raises(Fatal, match="A row failed"):
        cursor.execute("SET n='SELECT chat(repeat(''long '', 5000))' WHERE type=\"sql\"")
    cursor.close()


def test_a_name_may_become_another_kind_of_model(con, deploy, checkpoints):
    """Deploying a classifier under an embedding model's name changes the function's type for the next statement."""
    deploy(checkpoints["encoder"], "m")
    assert con.execute("SELECT typeof(m('a'))").fetchone() == ("FLOAT[32]",)
    deploy(checkpoints["classifier"], "m")
    assert con.execute("SELECT typeof(m('a'))").fetchone()[0].startswith("STRUCT")


def test_a_failed_redeploy_leaves_the_running_model(con, deploy, checkpoints, tmp_path):
    """When the new checkpoint is bad the old one keeps answering."""
    deploy(checkpoints["encoder"], "emb")
    before = con.execute("SELECT emb('a')").fetchone()
    with pytest.raises(UserError):
        deploy(tmp_path / "missing", "emb")
    con.execute('!llm setup "cache=off"')
    assert con.execute("SELECT emb('a')").fetchone() == before


def test_a_killed_worker_is_replaced_in_the_middle_of_a_query(con, deploy, checkpoints):
    """SIGKILL of a worker costs time, never a row."""
    deploy(checkpoints["encoder"], "emb", "num_workers=2")
    victim = workers("emb")[0]
    with ThreadPoolExecutor(1) as threads:
        query = threads.submit(
            lambda: con.cursor().execute("SELECT count(emb('text ' || i)) FROM range(6000) t(i)").fetchall()
        )
        while not con.session.statements.running() or not con.session.statements.running()[0].answered:
            time.sleep(0.005)
        os.kill(victim, signal.SIGKILL)
        assert query.result(timeout=120) == [(6000,)]
    assert con.session.history[-1].failed == 0


def test_another_process_reconnects(con, deploy, checkpoints, ray_cluster):
    """A second process attaches by the cluster's address and calls the model that this one deployed."""
    deploy(checkpoints["encoder"], "shared")
    script = f"""
        !llm setup "ray_address={ray_cluster.address}";
        RUN command AS LLM.`` WHERE action="infer" AND reconnect="true" AND udfName="shared";
        SELECT count(shared('x' || i)) AS n FROM range(100) t(i);
    """
    done = subprocess.run(
        [Path(sys.executable).with_name("sqlext"), "--json", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == '{"n":100}'
    assert con.execute("SELECT count(shared('still here'))").fetchone() == (1,)


def test_ctrl_c_returns_at_once_and_leaves_everything_usable(ray_cluster, tmp_path):
    """SIGINT in mid-query: KeyboardInterrupt in under a second; the session and its workers go on."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
        import os, signal, threading, time, sqlext
        con = sqlext.connect()
        con.execute('!llm setup "ray_address={ray_cluster.address}" "infer_backend=fake_engines:load"')
        con.execute('RUN command AS LLM.`` WHERE action="infer" AND udfName="slow"')
        def press():
            while not any(s.usage or s.answered for s in con.session.statements.running()):
                time.sleep(0.01)
            global pressed
            pressed = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=press).start()
        try:
            con.execute("SELECT slow('wait 0.2 ' || i) FROM range(500) t(i)").fetchall()
            print("not interrupted")
        except KeyboardInterrupt:
            print("seconds", time.monotonic() - pressed)
        started = time.monotonic()
        print("answer", con.execute("SELECT slow('fine')").fetchone()[0], time.monotonic() - started)
        con.execute('!llm model remove "slow"')
        con.close()
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert float(said["seconds"]) < 1
    assert said["answer"].startswith("FINE")
    assert float(said["answer"].split()[1]) < 5


def test_two_sessions_in_one_process_are_apart(con, deploy, checkpoints):
    """Another database has its own functions, settings and variables."""
    deploy(checkpoints["encoder"], "emb", "num_workers=1")
    con.execute("SET name='one'")
    with sqlext.connect() as other:
        with pytest.raises(duckdb.CatalogException):
            other.execute("SELECT emb('a')")
        assert other.execute("SELECT '${name}'").fetchone() == ("${name}",)
        other.execute('RUN command AS LLM.`` WHERE action="infer" AND reconnect="true" AND udfName="emb"')
        assert other.execute("SELECT emb('a')").fetchone() == con.execute("SELECT emb('a')").fetchone()
    assert con.execute("SELECT emb('b') IS NOT NULL").fetchone() == (True,)


def test_usage_counts_what_was_done(con, deploy, checkpoints):
    """!llm usage: rows, calls and reused rows of each statement."""
    deploy(checkpoints["encoder"], "emb")
    con.execute("SELECT emb('t' || (i % 10)) FROM range(100) t(i)").fetchall()
    con.execute("SELECT emb('t' || i) FROM range(10) t(i)").fetchall()
    used = con.execute("!llm usage").df()[["model", "rows", "calls", "reused", "errors"]].values.tolist()
    assert used == [["emb", 100, 10, 90, 0], ["emb", 10, 0, 10, 0]]


def test_a_variable_that_is_set_by_a_query_leaves_the_connection_free(con, deploy, checkpoints):
    """SET … type="sql" reads its query to the end: a model can be deployed right after it."""
    con.execute('SET first="SELECT i FROM range(5000) r(i) ORDER BY i" WHERE type="sql"')
    deploy(checkpoints["chat"], "after_set")
    assert con.execute("SELECT after_set('x', max_tokens := 1) IS NOT NULL, '${first}'").fetchall() == [(True, "0")]
