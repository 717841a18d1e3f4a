"""The table of phases: the allowed transitions."""

import itertools
import json

import pytest

from rtservice.net.phases import Phase, next_phase

ALLOWED = {
    ("proxy", "tls"),
    ("proxy", "open"),
    ("tls", "open"),
    ("tls", "closing"),
    ("open", "tls"),
    ("open", "closing"),
}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Phase, repeat=2)))
def test_only_the_transitions_of_the_table_are_allowed(before: Phase, after: Phase) -> None:
    if (before, after) in ALLOWED:
        assert next_phase(before, after) is after
    else:
        with pytest.raises(RuntimeError, match=f"a connection in phase {before} cannot enter phase {after}"):
            next_phase(before, after)


def test_logs_and_json_contain_the_value_of_a_phase() -> None:
    assert [f"{phase}" for phase in Phase] == ["proxy", "tls", "open", "closing"]
    assert json.dumps({"phase": Phase.TLS}) == '{"phase": "tls"}'
    assert {"open": 1}[Phase.OPEN] == 1
