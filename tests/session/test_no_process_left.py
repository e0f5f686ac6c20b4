"""A driver that is killed leaves no process behind: no worker, none of an engine's own, none of Ray's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

SQLEXT = str(Path(sys.executable).with_name("sqlext"))


def test_a_killed_driver_leaves_no_process(tmp_path):
    """kill -9 of a script with a deployed model whose engine has a process of its own, as some have on a GPU."""
    child = tmp_path / "pid"
    script = f"""
        !llm setup "infer_backend=fake_engines:load_with_child" "num_gpus=0";
        RUN command AS LLM.`{child}` WHERE action="infer" AND udfName="m";
        SELECT m('wait 600');
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [SQLEXT, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as driver:
        assert driver.stdout
        assert any("wait" in line or "m(prompt)" in line for line in driver.stdout)
        family = psutil.Process(driver.pid).children(recursive=True)
        family.append(psutil.Process(int(child.read_text())))
        assert any("raylet" in process.name() for process in family)
        os.kill(driver.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=120)  # the agents of Ray look after their raylet now and then
    assert [process.name() for process in alive] == []
