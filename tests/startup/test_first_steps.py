"""The message after the start shows how to try the service and how to stop it."""

import pytest

from rtservice.startup.first_steps import first_steps


@pytest.mark.parametrize(
    ("listeners", "command"),
    [
        (["tcp:0.0.0.0:8080", "tcp:[::]:8080"], "nc localhost 8080"),
        (["tcp:127.0.0.1:7"], "nc localhost 7"),
        (["tcp:192.0.2.1:7"], "nc 192.0.2.1 7"),
        (["tcp:[2001:db8::1]:7"], "nc 2001:db8::1 7"),
        (["ssl:0.0.0.0:8443"], "openssl s_client -quiet -connect localhost:8443"),
        (["ssl:[2001:db8::1]:8443"], "openssl s_client -quiet -connect [2001:db8::1]:8443"),
        (["ssl:0.0.0.0:8443", "tcp:0.0.0.0:8080"], "nc localhost 8080"),
        (["unix:/run/a b.sock"], "nc -U '/run/a b.sock'"),
        (["proxy:tcp:0.0.0.0:8080", "tcp:0.0.0.0:8081"], "nc localhost 8081"),
    ],
)
@pytest.mark.parametrize("protocol", ["echo", "chat"])
def test_shipped_protocol_is_shown_with_a_command_to_try_it(protocol, listeners, command) -> None:
    assert first_steps(protocol, listeners, terminal=True) == f"try it with `{command}`, stop it with Ctrl-C"


@pytest.mark.parametrize(
    ("protocol", "listeners"),
    [
        ("mine:Factory", ["tcp:0.0.0.0:8080"]),
        ("echo", ["proxy:tcp:0.0.0.0:8080"]),
        ("echo", ["ssl:unix:/run/s"]),
        ("echo", []),
        ("echo", ["::1:8080"]),
    ],
)
def test_no_command_is_shown_if_none_would_work(protocol, listeners) -> None:
    assert first_steps(protocol, listeners, terminal=True) == "stop it with Ctrl-C"


def test_without_a_terminal_the_stop_signal_is_shown() -> None:
    assert (
        first_steps("echo", ["tcp:0.0.0.0:7"], terminal=False) == "try it with `nc localhost 7`, stop it with SIGTERM"
    )
