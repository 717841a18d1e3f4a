"""The user and groups of `--uid` and `--gid`: look them up, assume them, and verify the result."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass

# (uid_t)-1 is no user: setresuid(2) takes it for "leave unchanged". The same holds for groups.
_MOST = 2**32 - 2


class CredentialsError(Exception):
    """The process cannot run as this user or group; the text begins with the option that says so."""


@dataclass(frozen=True)
class Credentials:
    """What to run as: `uid` and `gid`, each None to keep what the process has.

    `groups` are the supplementary groups, the group itself among them; None to keep those that the process has.
    """

    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] | None = None

    def __bool__(self) -> bool:
        return self.uid is not None or self.gid is not None

    def assume(self) -> None:
        """Change the real, effective and saved ids of this process for good, and verify them.

        Raises CredentialsError. Groups come first, which takes privileges that are gone once the user has changed.
        """
        groups, gid, uid = self.groups, self.gid, self.uid
        if groups is not None and set(os.getgroups()) != set(groups):
            self._change("uid", lambda: os.setgroups(groups))
        if gid is not None and set(os.getresgid()) != {gid}:
            self._change("gid", lambda: os.setresgid(gid, gid, gid))
        if uid is not None and set(os.getresuid()) != {uid}:
            self._change("uid", lambda: os.setresuid(uid, uid, uid))
        self._verify()

    def _change(self, option: str, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError as error:
            raise CredentialsError(
                f"--{option} {getattr(self, option)}: {(error.strerror or str(error)).lower()}; "
                "it takes root, or its capabilities setuid and setgid, and an id that the user namespace maps"
            ) from None

    def _verify(self) -> None:
        # A sandbox may answer that a call succeeded, and do nothing.
        for what, wanted, ids in (("uid", self.uid, os.getresuid()), ("gid", self.gid, os.getresgid())):
            # Real, effective and saved: from any of them the others can be set again (setresuid(2)).
            if wanted is not None and set(ids) != {wanted}:
                raise CredentialsError(
                    f"--{what} {wanted}: the process still runs as {what} {max(set(ids) - {wanted})}"
                )
        if self.groups is not None:
            kept = set(os.getgroups()) - set(self.groups)
            if kept:
                raise CredentialsError(
                    f"--uid {self.uid}: the process still has the supplementary group {min(kept)}, "
                    "which is not this user's"
                )


def resolve(uid: int | None, gid: int | None) -> Credentials:
    """What the ids of `--uid` and `--gid` stand for; raises CredentialsError.

    The group of a user is that of its passwd entry, unless `gid` is given, and so are its supplementary groups. A user
    without an entry, as in most containers, has no supplementary groups; its group is that of the same number, unless
    that is somebody's: a system group of this number may have rights that nobody meant.
    The entries are those of now, also if the root directory changes later.
    """
    for option, number in (("uid", uid), ("gid", gid)):
        if number is not None and not 0 <= number <= _MOST:
            raise CredentialsError(f"--{option} {number}: not a number from 0 to {_MOST}")
    if uid is None:
        return Credentials(None, gid)
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        if gid is None:
            gid = uid
            name = _group_name(uid)
            if name is not None:
                raise CredentialsError(
                    f"--uid {uid}: no such user, and the group {uid} is {name}; --gid {uid} takes it, or another"
                ) from None
        groups: tuple[int, ...] = (gid,)
    else:
        gid = entry.pw_gid if gid is None else gid
        groups = tuple(sorted(set(os.getgrouplist(entry.pw_name, gid))))
    # One who is this user already keeps its groups, which take privileges to change.
    return Credentials(uid, gid, None if set(os.getresuid()) == {uid} else groups)


def _group_name(gid: int) -> str | None:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return None
