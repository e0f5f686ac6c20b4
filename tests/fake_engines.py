"""Engines without a model that behave badly on demand; workers import them by ``fake_engines:<function>``.

A prompt is an order: ``die`` kills the process, ``hang`` never returns, ``wait 0.5`` sleeps, ``raise <kind>`` raises;
``unsendable`` is answered with what cannot be pickled, anything else in capitals.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from runtime.errors import DeployError, EngineLost, ErrorInfo, Fatal, OutOfMemory, UserError
from runtime.spec import Answers, Batch, Delta, EngineInfo, Message, ModelSpec, Task


class Unpicklable(Exception):
    """Like many exceptions of SDKs: cannot be built again from its arguments, and holds a lock."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"status {status}: {body}")
        self.lock = threading.Lock()


class FakeEngine:
    """Rows one by one, each a piece of its own. Options: `oom_above` rows, `piece_s` between rows."""

    def __init__(self, spec: ModelSpec) -> None:
        self.options = dict(spec.options)
        self.lock = threading.Lock()
        threads = os.environ.get("OMP_NUM_THREADS", "")
        self.info = EngineInfo(engine="fake", task=Task.GENERATE, notes=(f"OMP_NUM_THREADS={threads}",))

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers]:
        if len(batch.prompts) > int(self.options.get("oom_above", 10**9)):
            raise OutOfMemory("The batch is too large.")
        for row, prompt in enumerate(batch.prompts):
            if stop.wait(float(self.options.get("piece_s", 0))):
                return
            text = str(prompt)
            if text == "lose engine once":  # the next process answers it
                self._lose_once()
            if text == "row error":
                yield Answers([row], [None], [""], [0], [0], 0.0, {row: ErrorInfo("bad_row", "It is bad.")})
                continue
            output = self if text == "unsendable" else obey(text, stop)
            yield Answers([row], [output], ["stop"], [len(text)], [1], 0.0)

    def _lose_once(self) -> None:
        mark = Path(str(self.options["mark"]))
        if not mark.exists():
            mark.touch()
            raise EngineLost("Its inner process died.")

    def close(self) -> None:
        pass


def obey(text: str, stop: threading.Event) -> str:
    order, _, argument = text.partition(" ")
    if order == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif order == "hang":
        ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock: nothing else in the process can answer
    elif order == "wait":
        stop.wait(float(argument))
    elif order == "raise":
        raise {
            "unpicklable": Unpicklable(500, "server said no"),
            "quoting": ValueError(f"cannot parse {text!r}"),
            "fatal": Fatal("The provider is closed.", code="closed", hint="Pay the bill."),
            "memory": MemoryError(),
            "exit": SystemExit(3),
        }[argument]
    return text.upper()


def load(spec: ModelSpec) -> FakeEngine:
    return FakeEngine(spec)


def load_user_error(spec: ModelSpec) -> FakeEngine:
    raise UserError("The folder has no config.json.", code="no_config", hint="Give the model's folder.")


def load_foreign_error(spec: ModelSpec) -> FakeEngine:
    raise Unpicklable(418, "no such weights")


def load_out_of_memory(spec: ModelSpec) -> FakeEngine:
    raise MemoryError


def load_exit(spec: ModelSpec) -> FakeEngine:
    sys.exit("library says goodbye")


def load_die(spec: ModelSpec) -> FakeEngine:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def load_hang(spec: ModelSpec) -> FakeEngine:
    ctypes.PyDLL(None).sleep(600)
    raise AssertionError


def load_sleep(spec: ModelSpec) -> FakeEngine:
    time.sleep(600)
    raise AssertionError


def load_one_of_two(spec: ModelSpec) -> FakeEngine:
    """The first of two workers loads, the second does not: `spec.path` is a folder both see."""
    try:
        (Path(spec.path) / "first").touch(exist_ok=False)
    except FileExistsError:
        raise DeployError("Only one can be.", code="second") from None
    return FakeEngine(spec)


def load_once(spec: ModelSpec) -> FakeEngine:
    """Loads the first time; every later process dies while it loads."""
    try:
        (Path(spec.path) / "once").touch(exist_ok=False)
    except FileExistsError:
        os.kill(os.getpid(), signal.SIGKILL)
    return FakeEngine(spec)


def load_with_child(spec: ModelSpec) -> FakeEngine:
    """Starts a process of its own, as some engines do, and writes its id to `spec.path`."""
    child = subprocess.Popen(["sleep", "600"])
    Path(spec.path).write_text(str(child.pid))
    return FakeEngine(spec)


class Moody(FakeEngine):
    """A row that begins with «bad» fails for as long as the file `spec.path` exists."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.mood = Path(spec.path)

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers]:
        for row, prompt in enumerate(batch.prompts):
            text = str(prompt)
            if text.startswith("bad") and self.mood.exists():
                yield Answers([row], [None], [""], [0], [0], 0.0, {row: ErrorInfo("moody", "Not today.", attempts=2)})
            else:
                yield Answers([row], [text.upper()], ["stop"], [len(text)], [1], 0.0)


def load_moody(spec: ModelSpec) -> FakeEngine:
    return Moody(spec)


class Counting(FakeEngine):
    def count_tokens(self, batch: Batch) -> list[int]:
        return [len(obey(str(prompt), threading.Event())) for prompt in batch.prompts]


def load_counting(spec: ModelSpec) -> FakeEngine:
    return Counting(spec)


class ProbeFails(FakeEngine):
    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers]:
        yield Answers([0], [None], [""], [0], [0], 0.0, {0: ErrorInfo("nan", "The model answers NaN.")})


def load_probe_fails(spec: ModelSpec) -> FakeEngine:
    return ProbeFails(spec)


class Typing(FakeEngine):
    """Answers with the words of the prompt's last turn, and how many turns there were, one word each `piece_s`."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.info = replace(self.info, streams=True, chat_template=True)

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers | Delta]:
        for row, prompt in enumerate(batch.prompts):
            turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
            words = [f"{word} " for word in turns[-1].content.split()] + [str(len(turns))]
            for word in words[:-1] if row in batch.stream else ():
                yield Delta(row, word)
                if stop.wait(float(self.options.get("piece_s", 0))):
                    return
            yield Answers([row], ["".join(words)], ["stop"], [len(turns)], [len(words)], 0.0)


def load_typing(spec: ModelSpec) -> FakeEngine:
    return Typing(spec)


class Heavy(FakeEngine):
    """Holds 300 MB."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.weights = b"\1" * 300_000_000


def load_heavy(spec: ModelSpec) -> FakeEngine:
    return Heavy(spec)


class Silent(FakeEngine):
    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers]:
        yield from ()


def load_silent(spec: ModelSpec) -> FakeEngine:
    return Silent(spec)
