"""SQL over a provider's model, against a hand-written asyncio client that knows which calls are needed.

The provider is `openai_server.py`: every answer takes 100 ms and 10 ms for each of its tokens, give or take half of
it. Both sides hold at most 64 requests in flight. Printed are the requests that were sent, those that are needed, and
the time of the SQL statement as a multiple of the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa
from openai import AsyncOpenAI, DefaultAioHttpClient
from openai_server import serve

import sqlext

CONCURRENCY = 64
EMBED_ROWS = 256


@dataclass(frozen=True)
class Case:
    """A statement, and what a client must ask for the same: stages of prompts, each made from the one before."""

    name: str
    sql: str
    first: Sequence[str]
    then: Callable[[str, str], str | None] = lambda prompt, answer: None
    embeds: bool = False


def question(number: int) -> str:
    return f"A question about row {number}, please answer with the last word word{number}"


def judged(number: int) -> str:
    return f"Is row {number} of interest? {'yes' if number % 4 == 0 else 'no'}"


CASES = (
    Case(
        "5,000 rows, 500 distinct",
        "SELECT chat(q) FROM questions, range(10) WHERE i < 500",
        [question(n) for n in range(500)],
    ),
    Case(
        "2,000 distinct",
        "SELECT chat(q) FROM questions WHERE i < 2000",
        [question(n) for n in range(2000)],
    ),
    Case(
        "a cheap predicate removes 80 %",
        "SELECT count(*) FROM questions WHERE chat(q) LIKE 'WORD%' AND i % 5 = 0",
        [question(n) for n in range(0, 5000, 5)],
    ),
    Case("LIMIT 20", "SELECT chat(q) FROM questions LIMIT 20", [question(n) for n in range(20)]),
    Case(
        "filter + map",
        "SELECT chat(q) FROM questions WHERE i < 2000 AND chat(judged) = 'YES'",
        [judged(n) for n in range(2000)],
        lambda prompt, answer: question(int(prompt.split()[2])) if answer == "YES" else None,
    ),
    Case(
        "join, 50 x 50",
        "SELECT count(*) FROM (FROM questions LIMIT 50) a JOIN (FROM questions LIMIT 50) b "
        "ON chat('Are ' || a.i || ' and ' || b.i || ' the same? ' || if(a.i = b.i, 'yes', 'no')) = 'YES'",
        [f"Are {a} and {b} the same? {'yes' if a == b else 'no'}" for a in range(50) for b in range(50)],
    ),
    Case("5,000 embeddings", "SELECT embed(q) FROM questions", [question(n) for n in range(5000)], embeds=True),
)


async def ideal(case: Case, url: str) -> int:
    """Ask all that is needed, each stage as soon as its row is ready; returns the number of requests."""
    async with AsyncOpenAI(base_url=url, api_key="none", http_client=DefaultAioHttpClient(), max_retries=0) as client:
        flight = asyncio.Semaphore(CONCURRENCY)
        sent = 0

        async def row(prompt: str) -> None:
            nonlocal sent
            following: str | None = prompt
            while following is not None:
                prompt = following
                async with flight:
                    sent += 1
                    reply = await client.chat.completions.create(
                        model="last-word", messages=[{"role": "user", "content": prompt}], temperature=0
                    )
                following = case.then(prompt, reply.choices[0].message.content or "")

        async def texts(batch: Sequence[str]) -> None:
            nonlocal sent
            async with flight:
                sent += 1
                await client.embeddings.create(model="embed", input=list(batch))

        if case.embeds:
            batches = [case.first[start : start + EMBED_ROWS] for start in range(0, len(case.first), EMBED_ROWS)]
            await asyncio.gather(*map(texts, batches))
        else:
            await asyncio.gather(*map(row, case.first))
        return sent


def ask(url: str, path: str, method: str = "GET") -> dict[str, object]:
    """One request to the server's own interface."""
    with urllib.request.urlopen(urllib.request.Request(url.replace("/v1", path), method=method)) as reply:
        found: dict[str, object] = json.load(reply)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    said = parser.parse_args()
    os.environ["SQLEXT_CACHE_DIR"] = tempfile.mkdtemp(prefix="sqlext-bench-")
    with serve("--base-ms", "100", "--token-ms", "10", "--spread", "0.5") as url, sqlext.connect() as con:
        where = f"""action="infer" AND pretrainedModelType="saas/openai" AND `saas.base_url`="{url}" """
        con.execute(f"""
            RUN command AS LLM.`` WHERE {where} AND `saas.model`="last-word" AND udfName="chat";
            RUN command AS LLM.`` WHERE {where} AND `saas.model`="embed" AND udfName="embed";
        """)
        rows = range(5000)
        con.register("made", pa.table({"i": rows, "q": map(question, rows), "judged": map(judged, rows)}))
        con.execute("CREATE TABLE questions AS FROM made")
        for case in CASES:
            if said.case not in case.name:
                continue
            con.execute("!llm cache clear")
            started = time.perf_counter()
            needed = asyncio.run(ideal(case, url))
            best = time.perf_counter() - started
            ask(url, "/reset", "POST")
            started = time.perf_counter()
            con.execute(case.sql).fetchall()
            ours = time.perf_counter() - started
            sent = ask(url, "/stats")["requests"]
            again = time.perf_counter()
            con.execute(case.sql).fetchall()
            again = time.perf_counter() - again
            more = int(str(ask(url, "/stats")["requests"])) - int(str(sent))
            print(
                f"{case.name:32} requests {sent} of {needed} needed, {ours / best:.2f} x the client's {best:.2f} s; "
                f"again: {more} requests, {again:.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
