"""What a protocol author imports."""

import copy
import json

import pytest
from twisted.python.failure import Failure

from rtservice.interfaces import Secret


def test_a_secret_shows_in_no_text_and_gives_its_text_when_asked() -> None:
    secret = Secret("hunter2")
    assert secret.reveal() == "hunter2"
    shown = [str(secret), repr(secret), f"{secret}", f"{secret!r}", f"{secret:>20}", str((secret,))]
    shown += [repr([secret]), repr({"password": secret}), str(ValueError(secret))]
    shown.append("%s %r" % (secret, secret))  # noqa: UP031  # what logging does
    assert not any("hunter2" in text for text in shown), shown
    assert all("<hidden>" in text for text in shown), shown


def test_a_traceback_with_all_variables_does_not_have_it() -> None:
    def fails(secret: Secret) -> None:
        raise OSError("no way")

    try:
        fails(Secret("hunter2"))
    except OSError:
        text = Failure(captureVars=True).getTraceback(detail="verbose")
    assert "<hidden>" in text
    assert "hunter2" not in text


def test_a_secret_that_is_used_as_a_text_by_mistake_is_an_error() -> None:
    secret = Secret("hunter2")
    for use in (lambda: "x" + secret, lambda: b"".join([secret]), lambda: json.dumps(secret), lambda: vars(secret)):
        with pytest.raises(TypeError) as caught:
            use()
        assert "hunter2" not in str(caught.value)


def test_secrets_are_compared_by_their_texts_and_with_nothing_else() -> None:
    assert Secret("a") == Secret("a") == copy.deepcopy(Secret("a"))
    assert Secret("a") != Secret("b")
    assert Secret("\udcff") != Secret("ÿ")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a")}) == 1
    assert Secret("a")
    assert not Secret("")
