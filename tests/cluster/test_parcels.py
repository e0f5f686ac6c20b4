"""Parcels: together when they finish together, never held back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from runtime.cluster.parcels import parcels
from runtime.spec import Answers


def piece(row: int) -> Answers:
    return Answers([row], [str(row)], ["stop"], [1], [1], 0.0)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_what_is_there_at_once_travels_together(threads):
    """A thousand pieces, one parcel, in their order."""
    pieces = [piece(row) for row in range(1000)]
    assert list(parcels(lambda: pieces, threads, 30.0)) == [tuple(pieces)]


def test_a_piece_does_not_wait_for_the_next(threads):
    """It is delivered while the engine is still at work on the next."""
    go_on = threading.Event()

    def slow() -> Iterator[Answers]:
        yield piece(0)
        go_on.wait(30)
        yield piece(1)

    got = parcels(slow, threads, 0.01)
    assert next(got) == (piece(0),)
    go_on.set()
    assert list(got) == [(piece(1),)]


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(1)])
def test_an_exception_comes_after_what_was_finished(threads, error):
    """Nothing that was paid for is lost."""

    def fails() -> Iterator[Answers]:
        yield piece(0)
        raise error

    got = parcels(fails, threads, 30.0)
    assert next(got) == (piece(0),)
    with pytest.raises(type(error)):
        next(got)
