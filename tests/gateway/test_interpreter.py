"""Settings of the interpreter are changed while rows are asked, and only then."""

from __future__ import annotations

import gc
import sys

import pytest
from scripted import ScriptedPool

from runtime.gateway import Gateway, Statement
from runtime.gateway.interpreter import SWITCH_S, THRESHOLDS, busy
from runtime.spec import CallOptions


@pytest.fixture(autouse=True)
def _as_before():
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_settings_are_changed_while_rows_are_asked_and_then_as_they_were():
    """Whatever the user has set."""
    seen = []
    gateway = Gateway(ScriptedPool(lambda _: seen.append((gc.get_threshold(), sys.getswitchinterval()))))
    gc.set_threshold(800, 11, 12)
    interval = sys.getswitchinterval()
    gateway.ask(CallOptions(), ["a"], Statement(1))
    gateway.close()
    assert seen == [(THRESHOLDS, SWITCH_S)]
    assert (gc.get_threshold(), sys.getswitchinterval()) == ((800, 11, 12), interval)


def test_blocks_may_overlap():
    """The settings last until the last block has ended."""
    usual = gc.get_threshold()
    with busy:
        with busy:
            pass
        assert gc.get_threshold() == THRESHOLDS
    assert gc.get_threshold() == usual


def test_a_collector_that_is_switched_off_stays_off():
    """The threshold 0 is the user's word."""
    gc.set_threshold(0)
    with busy:
        assert gc.get_threshold()[0] == 0
