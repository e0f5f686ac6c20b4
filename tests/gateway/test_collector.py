"""The garbage collector's thresholds are raised while rows are asked, and only then."""

from __future__ import annotations

import gc

from scripted import ScriptedPool

from runtime.gateway import Gateway, Statement
from runtime.gateway.collector import THRESHOLDS, relaxed
from runtime.spec import CallOptions


def test_thresholds_are_raised_while_rows_are_asked_and_then_as_they_were():
    """Also after a failure, and whatever the user has set."""
    seen = []
    gateway = Gateway(ScriptedPool(lambda _: seen.append(gc.get_threshold())))
    before = gc.get_threshold()
    try:
        gc.set_threshold(800, 11, 12)
        gateway.ask(CallOptions(), ["a"], Statement(1))
        assert seen == [THRESHOLDS]
        assert gc.get_threshold() == (800, 11, 12)
        with relaxed, relaxed:
            assert gc.get_threshold() == THRESHOLDS
        assert gc.get_threshold() == (800, 11, 12)
    finally:
        gc.set_threshold(*before)
        gateway.close()


def test_a_collector_that_is_switched_off_stays_off():
    """The threshold 0 is the user's word."""
    before = gc.get_threshold()
    try:
        gc.set_threshold(0)
        with relaxed:
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)
