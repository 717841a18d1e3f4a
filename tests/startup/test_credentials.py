"""The user, group and supplementary groups selected by --uid and --gid."""

import os
import pwd
from types import SimpleNamespace

import pytest

from rtservice.startup import credentials as module
from rtservice.startup.credentials import Credentials, CredentialsError, resolve

# In the fake account database: a user with two supplementary groups. 27 is a group but not a user.
WEB, WEB_GROUP = 1000, 1001


@pytest.fixture(autouse=True)
def accounts(monkeypatch) -> None:
    def user(uid: int) -> SimpleNamespace:
        if uid != WEB:
            raise KeyError(uid)
        return SimpleNamespace(pw_name="web", pw_gid=WEB_GROUP)

    def group(gid: int) -> SimpleNamespace:
        if gid != 27:
            raise KeyError(gid)
        return SimpleNamespace(gr_name="sudo")

    monkeypatch.setattr(module.pwd, "getpwuid", user)
    monkeypatch.setattr(module.grp, "getgrgid", group)
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, 50, 60, gid])


@pytest.mark.parametrize(
    ("uid", "gid", "expected"),
    [
        (None, None, Credentials()),
        (None, 7, Credentials(None, 7)),
        (WEB, None, Credentials(WEB, WEB_GROUP, (50, 60, WEB_GROUP))),
        (WEB, 7, Credentials(WEB, 7, (7, 50, 60))),
        (12345, None, Credentials(12345, 12345, (12345,))),
        (12345, 7, Credentials(12345, 7, (7,))),
        (27, 27, Credentials(27, 27, (27,))),
        (2**32 - 2, 0, Credentials(2**32 - 2, 0, (0,))),
    ],
)
def test_user_without_an_entry_has_only_the_group_with_its_number(uid, gid, expected) -> None:
    assert resolve(uid, gid) == expected
    assert bool(expected) is (uid is not None or gid is not None)


def test_existing_group_with_the_number_of_an_unknown_user_is_rejected() -> None:
    with pytest.raises(
        CredentialsError, match=r"^--uid 27: no such user, and the group 27 is sudo; choose the group with --gid$"
    ):
        resolve(27, None)


@pytest.mark.parametrize(
    ("uid", "gid", "option"), [(-1, None, "--uid -1"), (2**32 - 1, 1, "--uid"), (1, -1, "--gid -1")]
)
def test_number_that_means_no_change_to_the_system_is_rejected(uid, gid, option) -> None:
    with pytest.raises(CredentialsError, match=f"^{option}.*: out of range; accepted are 0 to"):
        resolve(uid, gid)


def test_supplementary_groups_are_kept_if_the_user_is_the_current_one(monkeypatch) -> None:
    monkeypatch.setattr(os, "getresuid", lambda: (WEB, WEB, WEB))
    assert resolve(WEB, None) == Credentials(WEB, WEB_GROUP, None)


def test_current_credentials_need_no_system_call(monkeypatch) -> None:
    def forbidden(*ids: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    for call in ("setgroups", "setresgid", "setresuid"):
        monkeypatch.setattr(os, call, forbidden)
    Credentials(os.getuid(), os.getgid(), tuple(os.getgroups())).assume()  # does not raise


@pytest.mark.parametrize(
    ("call", "option"), [("setgroups", "--uid 12345"), ("setresgid", "--gid 54321"), ("setresuid", "--uid 12345")]
)
@pytest.mark.parametrize("problem", [PermissionError(1, "Operation not permitted"), OSError(22, "Invalid argument")])
def test_change_rejected_by_the_system_is_reported_with_its_option(monkeypatch, call, option, problem) -> None:
    def refuse(*ids: object) -> None:
        raise problem

    for other in ("setgroups", "setresgid", "setresuid"):
        monkeypatch.setattr(os, other, refuse if other == call else lambda *ids: None)
    with pytest.raises(CredentialsError) as caught:
        Credentials(12345, 54321, (54321,)).assume()
    assert str(caught.value).startswith(f"{option}: {problem.strerror.lower()}; this needs root")


def test_current_user_is_found_in_the_account_database(monkeypatch) -> None:
    monkeypatch.undo()
    entry = pwd.getpwuid(os.getuid())
    assert resolve(entry.pw_uid, None) == Credentials(entry.pw_uid, entry.pw_gid, None)
