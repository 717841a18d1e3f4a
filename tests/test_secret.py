"""The class Secret hides its value."""

import copy
import json

import pytest
from twisted.python.failure import Failure

from rtservice.interfaces import Secret


def test_a_secret_is_hidden_in_every_text_and_returned_by_reveal() -> None:
    secret = Secret("hunter2")
    assert secret.reveal() == "hunter2"
    shown = [str(secret), repr(secret), f"{secret}", f"{secret!r}", f"{secret:>20}", str((secret,))]
    shown += [repr([secret]), repr({"password": secret}), str(ValueError(secret))]
    shown.append("%s %r" % (secret, secret))  # noqa: UP031  # as `logging` formats
    assert not any("hunter2" in text for text in shown), shown
    assert all("<hidden>" in text for text in shown), shown


def test_a_traceback_with_variables_hides_the_secret() -> None:
    def fails(secret: Secret) -> None:
        raise OSError("no way")

    try:
        fails(Secret("hunter2"))
    except OSError:
        text = Failure(captureVars=True).getTraceback(detail="verbose")
    assert "<hidden>" in text
    assert "hunter2" not in text


def test_using_a_secret_as_a_string_raises_type_error() -> None:
    secret = Secret("hunter2")
    for use in (lambda: "x" + secret, lambda: b"".join([secret]), lambda: json.dumps(secret), lambda: vars(secret)):
        with pytest.raises(TypeError) as caught:
            use()
        assert "hunter2" not in str(caught.value)


def test_a_secret_equals_only_a_secret_with_the_same_text() -> None:
    assert Secret("a") == Secret("a") == copy.deepcopy(Secret("a"))
    assert Secret("a") != Secret("b")
    assert Secret("\udcff") != Secret("ÿ")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a")}) == 1
    assert Secret("a")
    assert not Secret("")
