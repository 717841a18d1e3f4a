"""The rate limit of log records."""

from rtservice.log_rate import LogRateLimit


def test_first_events_of_an_interval_are_logged_and_the_others_counted() -> None:
    rate = LogRateLimit(3, 10.0)
    assert [rate.may_log(second) for second in (100.0, 100.1, 105.0, 105.1, 109.9)] == [True] * 3 + [False] * 2
    assert rate.take_suppressed() == 2
    assert rate.take_suppressed() == 0


def test_interval_starts_with_the_first_event_after_the_previous_interval() -> None:
    rate = LogRateLimit(1, 10.0)
    assert [rate.may_log(second) for second in (0.0, 9.9, 10.0, 19.9, 35.0, 44.9, 45.0)] == [True, False] * 3 + [True]
    assert rate.take_suppressed() == 3


def test_number_of_log_lines_is_bounded_at_any_event_rate() -> None:
    rate = LogRateLimit(5, 10.0)
    admitted = sum(rate.may_log(number / 1000) for number in range(100_000))
    assert admitted == 50
    assert rate.take_suppressed() == 100_000 - 50
