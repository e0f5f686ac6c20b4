"""`!llm jobs` and its kin, the tables of jobs, and what happens to jobs when a script ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_training
import psutil
import pytest

import sqlext
from runtime.cluster import jobs
from runtime.errors import Cancelled, Fatal, SqlSyntaxError, UserError
from runtime.training import job_roots
from runtime.training.folder import JobFolder
from sqlext.progress_lines import job_line, left_out_line


@pytest.fixture
def begin(
    con: sqlext.Connection, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., JobFolder]:
    """begin(name): a detached job of the fake training."""
    monkeypatch.setattr(jobs, "train_on_ranks", fake_training.train)
    con.execute("CREATE TABLE t AS SELECT 'hello' AS text FROM range(3); !llm setup sft \"num_gpus=0\"")

    def run(name: str, more: str = "") -> JobFolder:
        con.execute(
            f"""RUN t AS LLM.`{checkpoints["chat"]}` WHERE pretrainedModelType="sft/auto" AND name="{name}" {more}"""
        )
        return job_roots.find(con.fetchone()[0])

    return run


def one(con: sqlext.Connection, text: str) -> dict[str, Any]:
    """The one row of an answer."""
    rows = con.execute(text).fetchall()
    names = [column[0] for column in con.description]
    assert len(rows) == 1
    return dict(zip(names, rows[0], strict=True))


def test_no_jobs_are_an_empty_table(con: sqlext.Connection) -> None:
    """Also where nothing ever trained; Ray is not needed to say so."""
    assert con.execute("!llm jobs").fetchall() == []
    assert con.execute("FROM llm_jobs").fetchall() == []
    assert con.execute("FROM llm_job_metrics").fetchall() == []


def test_a_job_is_told_of_while_it_runs_and_after(con: sqlext.Connection, begin: Callable[..., JobFolder]) -> None:
    """Waited for by its name; the row tells how it did."""
    folder = begin("run", 'AND outputTable="out"')
    done = one(con, '!llm wait "run"')
    assert (done["job"], done["state"], done["rows"], done["tokens"]) == (folder.id, "finished", 3, 500)
    assert one(con, "FROM out") == done
    row = one(con, "!llm jobs")
    assert (row["job"], row["way"], row["state"], row["step"], row["steps"]) == (folder.id, "sft", "finished", 5, 5)
    assert row["model"] == str(folder.final)
    assert row["started"] is not None
    assert one(con, "SELECT bad_rows, truncated, base FROM llm_jobs")["bad_rows"] == 1


def test_one_job_in_detail(con: sqlext.Connection, begin: Callable[..., JobFolder]) -> None:
    """Its folder, rows and parameters, a row for each; found by how its id begins."""
    folder = begin("run", 'AND `sft.int.max_seq_length`="64"')
    con.execute(f'!llm wait "{folder.id}"')
    told = dict(con.execute(f'!llm job "{folder.id[:-2]}"').fetchall())
    assert told["folder"] == str(folder.path)
    assert told["max_seq_length"] == "64"
    assert (told["rows"], told["bad_rows"], told["truncated"], told["state"]) == ("3", "1", "2", "finished")
    assert told["model"] == str(folder.final)
    assert "error" not in told
    assert con.session.notices[-1].startswith("Of 3 rows 1 could not be used and 2 were cut at max_seq_length.")
    told = left_out_line({"rows": 3, "valid_rows": 5, "valid_bad_rows": 2})
    assert told == "Of 5 rows of validTable 2 could not be used."


def test_the_log_is_read_from_its_end(con: sqlext.Connection, begin: Callable[..., JobFolder]) -> None:
    """As many lines as wanted, of prints and of logging."""
    begin("run")
    con.execute('!llm wait "run"')
    lines = [line for (line,) in con.execute('!llm logs "run"').fetchall()]
    assert "printed by the training" in lines
    assert len(con.execute('!llm logs "run" "2"').fetchall()) == 2
    with pytest.raises(UserError, match="no number of lines"):
        con.execute('!llm logs "run" "all"')
    with pytest.raises(SqlSyntaxError, match="takes two arguments"):
        con.execute('!llm logs "run" "1" "2"')


def test_metrics_are_a_table(con: sqlext.Connection, begin: Callable[..., JobFolder]) -> None:
    """A row for each step that was logged, of all jobs."""
    first, second = begin("run"), begin("run")
    for folder in (first, second):
        con.execute(f'!llm wait "{folder.id}"')
    found = con.execute(
        "SELECT job, count(*), min(loss), max(tokens), max(eval_loss) FROM llm_job_metrics GROUP BY job"
    )
    assert sorted(found.fetchall()) == sorted((folder.id, 5, 0.2, 500, None) for folder in (first, second))


def test_a_failure_is_raised_by_who_waits_and_shown_by_who_lists(
    con: sqlext.Connection, begin: Callable[..., JobFolder]
) -> None:
    """With the code of its cause; then it goes on."""
    folder = begin("raise")
    with pytest.raises(Fatal) as caught:
        con.execute('!llm wait "raise"')
    assert caught.value.code == "training_failed"
    row = one(con, "SELECT state, error, hint FROM llm_jobs")
    assert row["state"] == "failed"
    assert row["error"].startswith("training_failed: RuntimeError")
    assert "!llm resume" in row["hint"]
    assert one(con, '!llm resume "raise"')["job"] == folder.id
    assert one(con, '!llm wait "raise"')["state"] == "finished"
    assert one(con, "SELECT error FROM llm_jobs") == {"error": None}


def test_a_lost_job_says_how_it_goes_on(con: sqlext.Connection, begin: Callable[..., JobFolder]) -> None:
    """Its process was killed."""
    folder = begin("die")
    with pytest.raises(Fatal) as caught:
        con.execute('!llm wait "die"')
    assert caught.value.code == "job_lost"
    assert f'!llm resume "{folder.id}";' in str(caught.value.hint)
    con.execute('!llm resume "die"; !llm wait "die"')
    assert one(con, "!llm jobs")["state"] == "finished"


def test_a_cancelled_job_is_no_error(con: sqlext.Connection, begin: Callable[..., JobFolder]) -> None:
    """Cancelling twice, or waiting for it, says what it is."""
    begin("wait")
    for statement in ('!llm cancel "wait"', '!llm cancel "wait"', '!llm wait "wait"'):
        assert one(con, statement)["state"] == "cancelled"


def test_ctrl_c_stops_the_waiting_and_not_the_job(con: sqlext.Connection, begin: Callable[..., JobFolder]) -> None:
    """Somebody may wait for it again."""
    begin("wait")
    stop = threading.Timer(0.5, con.interrupt)
    stop.start()
    with pytest.raises(Cancelled):
        con.execute('!llm wait "wait"')
    assert one(con, "!llm jobs")["state"] == "running"
    con.execute('!llm cancel "wait"')


def test_a_job_that_is_unknown_names_the_nearest(con: sqlext.Connection, begin: Callable[..., JobFolder]) -> None:
    """In each command."""
    begin("run")
    for verb in ("job", "logs", "wait", "cancel", "resume"):
        with pytest.raises(UserError) as caught:
            con.execute(f'!llm {verb} "rum"')
        assert (caught.value.code, caught.value.hint) == ("job_unknown", 'Did you mean "run"?')
    con.execute('!llm wait "run"')


def test_an_output_table_that_cannot_be_written_does_not_hide_the_job(
    con: sqlext.Connection, begin: Callable[..., JobFolder]
) -> None:
    """The model is there all the same, and what has come to stand there meanwhile stays."""
    begin("run", 'AND outputTable="out"')
    con.execute("CREATE TABLE out AS SELECT 1 AS mine")
    with pytest.raises(UserError) as caught:
        con.execute('!llm wait "run"')
    assert caught.value.code == "output_table"
    assert one(con, "!llm jobs")["state"] == "finished"
    assert one(con, "FROM out") == {"mine": 1}


def test_the_log_is_shown_without_keys(con: sqlext.Connection, begin: Callable[..., JobFolder]) -> None:
    """Whatever a library has printed."""
    folder = begin("run")
    con.execute('!llm wait "run"')
    with folder.log.open("a") as stream:
        stream.write("fetching s3://user:verysecretverysecret@bucket\n")
    shown = str(con.execute('!llm logs "run"').fetchall())
    assert "fetching" in shown
    assert "verysecret" not in shown


def test_a_job_that_is_over_can_be_removed(con: sqlext.Connection, begin: Callable[..., JobFolder]) -> None:
    """With its folder; one that runs cannot."""
    folder = begin("wait")
    with pytest.raises(UserError) as caught:
        con.execute('!llm jobs remove "wait"')
    assert caught.value.code == "job_running"
    con.execute('!llm cancel "wait"')
    assert one(con, '!llm jobs remove "wait"')["job"] == folder.id
    assert not folder.path.exists()
    assert con.execute("!llm jobs").fetchall() == []


def test_a_job_that_does_not_stop_is_told(
    con: sqlext.Connection, begin: Callable[..., JobFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs on a cluster that this program cannot reach; the wish stays."""
    monkeypatch.setattr(jobs, "CANCEL_S", 0.3)
    folder = begin("deaf")
    while folder.status().get("step") != 5:  # from here on nobody else writes the status
        time.sleep(0.05)
    pid = folder.status()["pid"]
    folder.update(cluster="elsewhere:1")
    assert one(con, '!llm cancel "deaf"')["state"] == "running"
    assert any("does not stop" in notice for notice in con.session.notices)
    assert folder.cancelled
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("status", "line"),
    [
        ({"state": "queued"}, "j: queued"),
        ({"state": "running"}, "j: running"),
        ({"state": "running", "doing": "reading rows: 10 of 20"}, "j: reading rows: 10 of 20"),
        (
            {"state": "running", "step": 500, "steps": 1000, "loss": 2.3456, "tokens_per_s": 1234.5, "seconds_left": 240},
            "j ━━━━━━━━━━╌╌╌╌╌╌╌╌╌╌ 500 of 1,000 steps · loss 2.35 · 1,234 tokens/s · 4 min left",
        ),
    ],
)  # fmt: skip
def test_the_line_of_a_job(status: dict[str, Any], line: str) -> None:
    """Steps of all, loss, speed and time left; before there are steps, what it does."""
    assert job_line("j", status) == line


# -- the end of a script, in a process that has a Ray of its own ------------------------------------------------

DRIVER = """
import sys, fake_training
from runtime.cluster import jobs
jobs.train_on_ranks = fake_training.train
exec(sys.argv.pop(1))
"""
CLI = "from sqlext.cli import main; main()"


def command(code: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return [sys.executable, "-c", DRIVER, code, *arguments], {**os.environ, "PYTHONPATH": path}


def script(model: Path, name: str, more: str = "") -> str:
    return f"""
        CREATE TABLE t AS SELECT 'hello' AS text;
        RUN t AS LLM.`{model}` WHERE pretrainedModelType="sft/auto" AND name="{name}" AND outputTable="out";
        {more}
    """


def only_job() -> tuple[JobFolder, dict[str, Any]]:
    (folder,) = job_roots.all_jobs()
    return folder, jobs.status(folder)


def test_a_script_waits_for_its_job_and_leaves_the_table(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Ray would end with the process: it is told on stderr, stdout is data; nothing is left running."""
    told, environment = command(
        CLI, "-c", script(checkpoints["chat"], "run"), "--db", str(tmp_path / "x.db"), "--json"
    )
    done = subprocess.run(told, env=environment, capture_output=True, text=True, timeout=120, check=True)
    folder, said = only_job()
    assert said["state"] == "finished"
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["job"] == folder.id
    with sqlext.connect(tmp_path / "x.db") as con:
        assert con.execute("SELECT job, state FROM out").fetchall() == [(folder.id, "finished")]
    assert not psutil.pid_exists(said["pid"])


def test_a_script_whose_job_fails_has_failed(checkpoints: dict[str, Path]) -> None:
    """Its exit code and stderr say so."""
    told, environment = command(CLI, "-c", script(checkpoints["chat"], "raise"))
    done = subprocess.run(told, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "RuntimeError in fake_training.py" in done.stderr
    assert "!llm resume" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_at_the_end_of_a_script_cancels_cleanly(checkpoints: dict[str, Path]) -> None:
    """It says how the job goes on; another session lets it."""
    told, environment = command(CLI, "-c", script(checkpoints["chat"], "wait"))
    with subprocess.Popen(
        told, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if any(folder.status().get("step") == 5 for folder in job_roots.all_jobs()):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    folder, said = only_job()
    assert said["state"] == "cancelled"
    assert process.returncode == 130
    assert f'!llm resume "{folder.id}";' in stderr
    assert not psutil.pid_exists(said["pid"])


def test_a_program_waits_too(checkpoints: dict[str, Path]) -> None:
    """At close, which comes at the end of Python when nobody closes; an error of the script changes nothing."""
    failing = script(checkpoints["chat"], "run", "SELECT nothing;")
    told, environment = command(f"import sqlext; con = sqlext.connect(); con.execute({failing!r})")
    done = subprocess.run(told, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert only_job()[1]["state"] == "finished"
    assert done.stderr.count("Traceback") == 1
    assert "BinderException" in done.stderr
