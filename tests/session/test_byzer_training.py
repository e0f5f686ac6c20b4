"""The training blocks of the Byzer-LLM document, as they stand; only paths and sizes are changed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

import sqlext
from runtime.training import job_roots

FILE = Path(__file__).parents[1] / "language" / "byzer.sql"
BLOCKS = dict(block.split("\n", 1) for block in FILE.read_text(encoding="utf-8").split("-- block: ")[1:])


def block(name: str, model: Path, jobs: Path, changes: Mapping[str, str]) -> str:
    """A block with its paths put right and its sizes cut down; each change is of something that is there."""
    text = re.sub(r'localModelDir="[^"]*"', f'localModelDir="{model}"', BLOCKS[name])
    text = re.sub(r'localPathPrefix="[^"]*"', f'localPathPrefix="{jobs}"', text)
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    return text


@pytest.fixture
def spark(con: sqlext.Connection) -> sqlext.Connection:
    con.execute("SET dialect='spark'")
    return con


def test_the_pretraining_block(spark: sqlext.Connection, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Whole files, repartitioned by file, a rank for each partition, DeepSpeed ZeRO-3 with offload."""
    raw = tmp_path / "raw_data"
    raw.mkdir()
    for number in range(3):
        (raw / f"{number}.txt").write_text(f"this is what stands in file {number} " * 20)
    changes = {
        "/data/raw_data": str(raw),
        'partitionNum="12"': 'partitionNum="2"',
        '"num_gpus=12"': '"num_gpus=0" "num_workers=2" "cpus_per_worker=1"',
    }
    spark.execute(block("pretrain", checkpoints["chat"], tmp_path / "jobs", changes))
    job, state = spark.fetchone()[:2]
    assert state in ("queued", "running")
    folder = job_roots.find(job)
    assert folder.path.parent == tmp_path / "jobs"
    spark.execute(f'!llm wait "{job}"')
    done = spark.execute("SELECT job, way, state, model, rows, steps > 0 FROM llama2_cn").fetchall()
    assert done == [(job, "sfft", "finished", str(folder.final), 3, True)]
    assert (folder.final / "model.safetensors").is_file()
    assert (folder.models / "Epoch-1").is_dir()
    assert spark.execute("SELECT count(*) > 0 FROM llm_job_metrics WHERE loss > 0").fetchone() == (True,)
    assert "<svg" in folder.report.read_text()


def test_the_fine_tuning_block(spark: sqlext.Connection, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """LoRA on a table that was loaded from JSON lines."""
    data = tmp_path / "dummy_data.jsonl"
    turns = [{"human": "who are you?", "assistant": "a model"}, {"human": "really?", "assistant": "yes"}]
    data.write_text("".join(json.dumps({"conversation_id": i, "conversation": turns}) + "\n" for i in range(12)))
    changes = {
        "/tmp/upload/dummy_data.jsonl": str(data),
        '"num_gpus=4"': '"num_gpus=0" "cpus_per_worker=1"',
        '"512"': '"64"',
    }
    spark.execute(block("finetune", checkpoints["chat"], tmp_path / "jobs", changes))
    (job, *_) = spark.fetchone()
    spark.execute(f'!llm wait "{job}"')
    model, rows = spark.execute("SELECT model, rows FROM llama2_300").fetchone()
    assert rows == 12
    assert (Path(model) / "adapter_model.safetensors").is_file()
    assert (Path(model) / "pretrained_model" / "config.json").is_file()
