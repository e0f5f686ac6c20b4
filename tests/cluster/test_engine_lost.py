"""An engine that died is noticed by a generation, whatever its process says, and comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.errors import WorkerLost
from tests.cluster.conftest import batch, outputs, pids


def test_a_lost_engine_comes_back_in_a_new_process(deploy, name: str, tmp_path: Path) -> None:
    """The worker that holds it answers every ping; its batch ends as lost, and the next process answers it."""
    pool = deploy(options={"mark": str(tmp_path / "died")})
    before = pids(name)
    with pytest.raises(WorkerLost):
        outputs(pool, 0, batch("a", "lose engine once", "b"))
    assert outputs(pool, 0, batch("a", "lose engine once", "b"))[::2] == ["A", "B"]
    assert pids(name) != before
