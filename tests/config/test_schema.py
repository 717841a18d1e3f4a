"""The schema: defaults, and what a reload applies."""

import pytest

from rtservice.config.schema import changes
from rtservice.config.values import (
    LEVELS,
    as_text,
)
from tests.support.settings import SETTINGS, make_settings


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_the_text_of_a_default_parses_to_the_default(setting) -> None:
    if not setting.repeatable:
        assert setting.kind.parse(as_text(setting.default)) == setting.default


def test_a_change_needs_a_reload_or_a_restart_as_the_schema_declares() -> None:
    old = make_settings(port=1, greeting=b"a")
    new = make_settings(port=1, greeting=b"b", max_connections=5, log_level=LEVELS.parse("warn"))
    assert changes(old, new) == (("max-connections", "log-level"), ("greeting",))
    assert changes(new, new) == ((), ())
