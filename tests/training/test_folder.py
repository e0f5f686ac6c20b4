"""The folder of a job, where jobs are found, and the page with their curves."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.errors import UserError
from runtime.training import job_roots, own_weights
from runtime.training.folder import JobFolder, JobRequest, new_folder
from runtime.training.plan import TrainingPlan
from runtime.training.report import write_report

PLAN = TrainingPlan(
    "/jobs/x",
    "sfft",
    model="/models/a",
    parameters={
        "max_seq_length": 128,
        "target_modules": ["q", "v"],
        "lr_scheduler_kwargs": {"a": 1.5},
        "packing": True,
    },
    deepspeed='{"zero_optimization": {"stage": 2}}',
    ranks=4,
    gpus_per_rank=1.0,
    resources={"master": 0.5},
    partitions=4,
)


def made(root: Path, name: str, **status: object) -> JobFolder:
    folder = new_folder(root, "sft", name)
    folder.ask(JobRequest(TrainingPlan(str(folder.path), "sft"), name=name))
    folder.update(state="finished", **status)
    return folder


def test_a_request_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Plan and names, through JSON."""
    folder = JobFolder(tmp_path)
    request = JobRequest(replace(PLAN, folder=str(tmp_path)), name="n", base="/models/a", output_table="t")
    folder.ask(request)
    assert folder.request() == request


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"plan": 1}', '{"plan": {"unknown": 1}}'])
def test_a_request_that_is_none_is_a_clear_error(tmp_path: Path, text: str) -> None:
    """Of another version, or damaged: never a traceback."""
    (tmp_path / "request.json").write_text(text)
    with pytest.raises(UserError) as caught:
        JobFolder(tmp_path).request()
    assert caught.value.code == "job_unreadable"


def test_folders_have_the_documents_layout(tmp_path: Path) -> None:
    """Way and time where there is no name; an id of its own for each, also under one name."""
    unnamed, first, second = (new_folder(tmp_path, "sft", name) for name in ("", "mine", "mine"))
    assert re.fullmatch(r"sft-\d{8}-\d\d-\d\d-\d\d-[0-9a-f]{8}", unnamed.id)
    assert re.fullmatch(r"mine-[0-9a-f]{8}", first.id)
    assert first.id != second.id
    assert {child.name for child in first.path.iterdir()} == {"finetune_data", "finetune_model", "logging"}
    assert first.final == first.path / "finetune_model" / "final"


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "a b", "a\n", "x" * 200, '"'])
def test_a_name_never_leads_out_of_the_root(tmp_path: Path, name: str) -> None:
    """Nothing is made."""
    with pytest.raises(UserError, match="is no name for a job"):
        new_folder(tmp_path / "root", "sft", name)
    assert not (tmp_path / "root").exists()


def test_a_root_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    """With the place and another way."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made") as caught:
        new_folder(tmp_path / "file", "sft", "")
    assert "localPathPrefix" in str(caught.value.hint)


def test_metrics_are_read_while_they_are_written(tmp_path: Path) -> None:
    """A line that was torn by a kill is left out; the others are there."""
    folder = JobFolder(tmp_path)
    folder.note({"step": 1, "loss": 2.5})
    with (folder.logging / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert list(folder.metrics()) == [{"step": 1, "loss": 2.5}]


def test_the_last_lines_of_the_log(tmp_path: Path) -> None:
    """As many as were asked for."""
    folder = JobFolder(tmp_path)
    assert folder.log_lines(10) == []
    folder.logging.mkdir()
    folder.log.write_text("".join(f"line {number}\n" for number in range(100)))
    assert folder.log_lines(3) == ["line 97", "line 98", "line 99"]


def test_jobs_are_found_under_every_root_that_was_used(tmp_path: Path) -> None:
    """By id, by the beginning of an id, by name: then the newest."""
    root = tmp_path / "elsewhere"
    job_roots.remember(root)
    here, there = made(job_roots.default_root(), "a"), made(root, "b")
    newer = made(root, "b")
    for age, folder in enumerate((newer, there, here)):
        os.utime(folder.path / "request.json", (1e9 - age, 1e9 - age))
    assert [job.id for job in job_roots.all_jobs()] == [here.id, there.id, newer.id]
    assert job_roots.find(there.id) == there
    assert job_roots.find(there.id[:-1]) == there
    assert job_roots.find("b") == newer
    job_roots.remember(root)
    assert (job_roots.default_root() / "roots.txt").read_text() == f"{root}\n"


def test_a_job_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    """And a beginning that several have asks for more of it."""
    made(job_roots.default_root(), "reviews")
    with pytest.raises(UserError) as caught:
        job_roots.find("reveiws")
    assert (caught.value.code, caught.value.hint) == ("job_unknown", 'Did you mean "reviews"?')
    made(job_roots.default_root(), "review-2")
    with pytest.raises(UserError) as caught:
        job_roots.find("rev")
    assert caught.value.code == "job_ambiguous"


def test_a_removed_root_is_no_error(tmp_path: Path) -> None:
    """A folder of jobs may be deleted at any time."""
    job_roots.remember(tmp_path / "gone")
    assert job_roots.all_jobs() == []


def test_the_report_is_one_file_that_needs_nothing_else(tmp_path: Path) -> None:
    """Curves as SVG, figures as tables; names are escaped; nothing is fetched from anywhere."""
    folder = made(tmp_path, "x", rows=10, started=1e9)
    folder.ask(JobRequest(TrainingPlan(str(folder.path), "sft", parameters={"tokenizer_path": "<script>"})))
    for step in range(1, 5_001):
        folder.note(
            {"step": step, "loss": 1 / step, "learning_rate": 1e-4} | ({"eval_loss": 0.5} if step % 1000 == 0 else {})
        )
    write_report(folder)
    page = folder.report.read_text()
    assert page.count("<svg") == 2
    assert "eval_loss" in page
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "<tr><td>5,000</td>" in page
    fetched = re.findall(r'(?:src|href)="([^#"][^"]*)"', page)
    assert fetched == []
    assert len(page) < 400_000


def test_a_report_bears_nan_and_lines_without_a_loss(tmp_path: Path) -> None:
    """The loss of a training that went wrong is what its report is for."""
    folder = made(tmp_path, "x")
    for loss in (1.0, float("nan"), float("inf"), None):
        folder.note({"step": 1, "loss": loss})
    write_report(folder)
    assert "<svg" in folder.report.read_text()


def test_weights_are_fetched_whole_and_without_pickles(tmp_path: Path) -> None:
    """Through fsspec; only what a checkpoint needs, with its folders."""
    import fsspec

    system = fsspec.filesystem("memory")
    for name in (
        "config.json",
        "model.safetensors",
        "sub/tokenizer.json",
        "pytorch_model.bin",
        "code.py",
        ".git/x.json",
    ):
        system.pipe(f"/bucket/model/{name}", b"{}")
    told: list[str] = []
    folder = own_weights.fetch("memory://bucket/model", tmp_path / "fetched" / "base", told.append)
    found = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert found == ["config.json", "model.safetensors", "sub/tokenizer.json"]
    assert told[0] == "fetching config.json"


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("memory://nothing/here", "weights_missing"),
        ("nosuch://x/y", "weights_unreachable"),
        ("simplecache::file:///etc", "weights_address"),
    ],
)
def test_an_address_that_cannot_be_fetched_leaves_nothing(tmp_path: Path, address: str, code: str) -> None:
    """A clear error, and no half folder."""
    with pytest.raises(UserError) as caught:
        own_weights.fetch(address, tmp_path / "fetched" / "base", lambda _: None)
    assert caught.value.code == code
    assert list(tmp_path.glob("*/*")) == []


def test_an_address_is_refused_where_folders_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLEXT_ROOTS also keeps the network out; keys in the address are not shown."""
    monkeypatch.setenv("SQLEXT_ROOTS", str(tmp_path))
    with pytest.raises(UserError) as caught:
        own_weights.check_address("ftp://user:verysecret@host/x")
    assert caught.value.code == "checkpoint_outside_roots"
    assert "verysecret" not in str(caught.value)


def test_status_is_written_whole(tmp_path: Path) -> None:
    """No temporary file is left; fields are added to what was there."""
    folder = JobFolder(tmp_path)
    folder.update(state="queued", rows=3)
    folder.update(state="running")
    assert folder.status() == {"state": "running", "rows": 3}
    assert json.loads((tmp_path / "status.json").read_text())["rows"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]
