"""Secret parts of texts are hidden."""

import pytest

from rtservice.hidden import OPEN_TYPES, hide_in_description, hide_userinfo, hide_values, values_in_description
from rtservice.net.description import TYPES


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://user:hunter2@db.example:6379/0", "redis://<hidden>@db.example:6379/0"),
        ("rediss://:hunter2@db", "rediss://<hidden>@db"),
        ("amqp://hunter2@db", "amqp://<hidden>@db"),
        ("x://u:hunt@er2@db/a@b", "x://<hidden>@db/a@b"),
        ("redis://a:hunter2@b and redis://c:hunter2@d", "redis://<hidden>@b and redis://<hidden>@d"),
        (r"redis\://u\:hunter2@db", r"redis\://<hidden>@db"),
        ("redis://db/0", "redis://db/0"),
        ("me@example.org", "me@example.org"),
        ("https://example.org/@me", "https://example.org/@me"),
    ],
)
def test_user_and_password_of_a_url_are_hidden(text, shown) -> None:
    assert hide_userinfo(text) == shown


@pytest.mark.parametrize(
    ("description", "shown"),
    [
        ("8080", "8080"),
        ("tcp:8080:interface=::1", "tcp:8080:interface=::1"),
        ("proxy:ssl:1:privateKey=/key:certificates=/d", "proxy:ssl:1:privateKey=/key:certificates=/d"),
        ("stdio:", "stdio:"),
        ("nosuch:1", "nosuch:1"),
        ("onion:80:privateKey=hunter2", "onion:80:privateKey=<hidden>"),
        (r"onion:80:key=hunter\:2:port=5:x=a\\:y=b", r"onion:80:key=<hidden>:port=5:x=<hidden>:y=<hidden>"),
        ("x:key==hunter2=:interface=a", "x:key=<hidden>:interface=a"),
        ("x:url=http://a", "x:url=<hidden>://a"),
        (r"via:redis\://u\:hunter2@db:tcp:80", r"via:redis\://<hidden>@db:tcp:80"),
    ],
)
def test_values_in_descriptions_of_other_types_are_hidden(description, shown) -> None:
    assert hide_in_description(description) == shown


def test_hidden_values_of_a_description_are_hidden_in_other_errors() -> None:
    description = r"x:80:a=hunter\:2:b=:c=80:interface=::1:d=hunter\:234"
    values = values_in_description(description)
    assert values == ["hunter:2", "", "80", "hunter:234"]
    assert values_in_description("ssl:1:privateKey=/key") == []
    message = "80 is no port: 'hunter:234', 'hunter:2'"
    assert hide_values(message, values) == "80 is no port: '<hidden>', '<hidden>'"


def test_only_types_of_rtservice_are_shown_completely() -> None:
    assert OPEN_TYPES == TYPES
