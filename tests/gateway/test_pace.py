"""When a failed row is tried again, and when nothing is sent: the three rules on a clock of the test's own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runtime.gateway.pace import Pace, RetryPolicy

POLICY = RetryPolicy()


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    return Pace(POLICY, clock)


def opened(pace: Pace, clock: Clock) -> Pace:
    """The pace with its breaker open and the pause over."""
    for _ in range(POLICY.failures_in_a_row):
        assert not pace.failed(clock.now, 64)
    clock.now += POLICY.pause_s
    return pace


@pytest.mark.parametrize(("attempt", "most"), [(1, 1.0), (2, 2.0), (3, 4.0), (6, 30.0), (60, 30.0), (1100, 30.0)])
def test_a_delay_is_random_under_a_bound_that_doubles(attempt: int, most: float):
    """Full jitter: between the first delay and twice, four times, … as much, never above the longest."""
    delays = [POLICY.delay(attempt, 0.0) for _ in range(500)]
    assert min(delays) >= POLICY.first_delay_s
    assert max(delays) <= most
    assert len(set(delays)) > 400
    assert max(delays) > most * 0.8


def test_the_provider_s_word_is_the_shortest_delay():
    """Retry-After is a lower bound, also above the longest delay of our own."""
    assert min(POLICY.delay(1, 7.5) for _ in range(100)) == 7.5
    assert POLICY.delay(9, 100.0) == 100.0


def test_without_trouble_there_is_no_bound(pace: Pace):
    """As many rows as the slots take."""
    pace.answered(10)
    assert pace.room(0) is None
    assert pace.room(100_000) is None


def test_too_many_stops_everything_as_long_as_the_provider_asks(pace: Pace, clock: Clock):
    """Nothing is sent before Retry-After is over, and then half as many rows."""
    pace.slow_down(12.0, 40)
    assert pace.room(0) == 0
    clock.now += 11.999
    assert pace.room(0) == 0
    clock.now += 0.001
    assert pace.room(0) == 20
    assert pace.room(15) == 5
    assert pace.room(33) == 0


def test_one_wave_of_refusals_counts_once(pace: Pace, clock: Clock):
    """Sixty rows refused together halve the rows in flight once, and the longest wait holds."""
    for retry_after_s in [2.0] * 30 + [5.0] + [1.0] * 29:
        pace.slow_down(retry_after_s, 60)
    assert pace.resume_at == clock.now + 5.0
    clock.now += 5.0
    assert pace.room(0) == 30


def test_without_a_word_the_waits_grow_until_something_is_answered(pace: Pace, clock: Clock):
    """Refused again and again: longer and longer delays; one answer begins anew."""

    def wait() -> float:
        pace.slow_down(0.0, 2)
        waits = pace.resume_at - clock.now
        clock.now = pace.resume_at
        return waits

    bounds = [1.0, 2.0, 4.0, 8.0]
    assert all(POLICY.first_delay_s <= wait() <= bound + 1e-6 for bound in bounds)
    pace.answered(1)
    assert wait() <= 1.0 + 1e-6


def test_a_provider_that_refuses_everything_stops_the_statement(pace: Pace, clock: Clock):
    """Twenty waves of refusals without an answer between them; with one, the count begins anew."""

    def refused() -> bool:
        clock.now = max(clock.now, pace.resume_at)
        return pace.slow_down(1.0, 4)

    assert not any(refused() for _ in range(POLICY.failures_in_a_row - 1))
    pace.answered(1)
    assert [refused() for _ in range(POLICY.failures_in_a_row)].index(True) == POLICY.failures_in_a_row - 1
    assert pace.room(0)


def test_the_room_halves_down_to_one_and_grows_by_one_for_each_room_full(pace: Pace, clock: Clock):
    """Additive increase, multiplicative decrease; one row may always be tried."""
    for _ in range(10):
        pace.slow_down(1.0, 1)
        clock.now += 1.0
    assert pace.room(0) == 1
    for expected in range(2, 12):
        pace.answered(pace.room(0) or 0)
        assert abs((pace.room(0) or 0) - expected) <= 1
    grown = pace.room(0) or 0
    pace.slow_down(1.0, grown)
    clock.now += 1.0
    assert pace.room(0) == grown // 2


def test_failures_in_a_row_pause_everything(pace: Pace, clock: Clock):
    """Nineteen do not; the twentieth does, for the pause and not longer."""
    for _ in range(POLICY.failures_in_a_row - 1):
        assert not pace.failed(clock.now, 64)
        assert pace.room(0) is None
    assert not pace.failed(clock.now, 64)
    assert pace.room(0) == 0
    clock.now += POLICY.pause_s - 0.001
    assert pace.room(0) == 0
    clock.now += 0.001
    assert pace.room(0) == 1
    assert pace.room(1) == 0


def test_one_answer_between_failures_keeps_it_running(pace: Pace, clock: Clock):
    """What counts is failures without any success between them."""
    for _ in range(10):
        for _ in range(POLICY.failures_in_a_row - 1):
            pace.failed(clock.now, 64)
        pace.answered(1)
    assert pace.room(0) is None


def test_rows_that_were_in_flight_when_the_breaker_opened_are_no_trials(pace: Pace, clock: Clock):
    """A batch of 64 that fails as one pauses; it does not use up the trials that were never made."""
    stops = [pace.failed(clock.now, 64) for _ in range(64)]
    assert not any(stops)
    clock.now += POLICY.pause_s
    assert not any(pace.failed(clock.now, 64) for _ in range(64))  # a second batch, that took as long as the pause
    assert pace.room(0) == 1


def test_three_failed_trials_stop_the_statement(pace: Pace, clock: Clock):
    """One row at a time, with a delay after each; the third failure says stop, and the next statement starts anew."""
    opened(pace, clock)
    for trial in range(1, POLICY.trials + 1):
        assert pace.room(0) == 1
        assert pace.failed(clock.now, 1) == (trial == POLICY.trials)
        if trial < POLICY.trials:
            assert pace.room(0) == 0
            clock.now = pace.resume_at
    assert pace.room(0) is None


def test_a_trial_that_is_answered_closes_the_breaker(pace: Pace, clock: Clock):
    """The provider is back: as many rows as before, and twenty failures are needed again."""
    opened(pace, clock)
    assert not pace.failed(clock.now, 1)
    clock.now = pace.resume_at
    pace.answered(1)
    assert pace.room(0) is None
    clock.now += 1.0
    assert not any(pace.failed(clock.now, 64) for _ in range(POLICY.failures_in_a_row - 1))
    assert pace.room(0) is None


def test_rows_sent_before_the_last_answer_say_nothing_about_the_provider(pace: Pace, clock: Clock):
    """Fifty bad rows that are left over at the end of a table do not open the breaker."""
    sent = clock.now
    clock.now += 1.0
    pace.answered(1000)
    clock.now += 1.0
    assert pace.answered_since(sent)
    assert not pace.answered_since(clock.now)
    assert not any(pace.failed(sent, 50) for _ in range(250))
    assert pace.room(0) is None


def test_an_open_breaker_and_a_refusal_go_together(clock: Clock):
    """A trial that is refused waits as the provider asks, and is still a trial afterwards."""
    pace = opened(Pace(replace(POLICY, failures_in_a_row=3, trials=2), clock), clock)
    pace.slow_down(60.0, 1)
    clock.now += 59.0
    assert pace.room(0) == 0
    clock.now += 1.0
    assert pace.room(0) == 1
    assert [pace.failed(clock.now, 1), pace.room(0)] == [False, 0]
    clock.now = pace.resume_at
    assert pace.failed(clock.now, 1)
