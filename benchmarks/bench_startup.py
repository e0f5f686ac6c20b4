"""Start-up: `sqlext --help` and `import sqlext`, and that neither loads a heavy library."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 7
HEAVY = ("ray", "torch", "transformers", "pandas", "duckdb", "pyarrow")


def seconds(*command: str) -> float:
    """Median wall time of `command` over some runs, after one that is not counted."""
    times = []
    for _ in range(RUNS + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> None:
    python = sys.executable
    empty = seconds(python, "-c", "pass")
    imported = seconds(python, "-c", "import sqlext")
    shown = seconds(str(Path(python).with_name("sqlext")), "--help")
    print(f"empty Python          {empty:.3f} s")
    print(f"import sqlext         {imported:.3f} s, {imported - empty:.3f} s of it ours")
    print(f"sqlext --help         {shown:.3f} s, {shown - empty:.3f} s of it ours")
    check = f"import sys, sqlext.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    loaded = subprocess.run([python, "-c", check], check=True, capture_output=True, text=True).stdout.strip()
    print(f"heavy modules loaded  {loaded}")


if __name__ == "__main__":
    main()
