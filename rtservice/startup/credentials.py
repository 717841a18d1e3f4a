"""The user and groups of `--uid` and `--gid`: resolve them, change to them, and verify the result."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass

# The highest id. (uid_t)-1 means "unchanged" in setresuid(2). The same applies to groups.
_MOST = 2**32 - 2


class CredentialsError(Exception):
    """The process cannot run as this user or group. The text begins with the option."""


@dataclass(frozen=True)
class Credentials:
    """The user, group and supplementary groups to run as; None keeps the process's own.

    `groups` are the supplementary groups, including the group itself.
    """

    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] | None = None

    def __bool__(self) -> bool:
        return self.uid is not None or self.gid is not None

    def assume(self) -> None:
        """Change the real, effective and saved ids of this process permanently, and verify them.

        Raises CredentialsError. Groups are changed first, since this needs privileges that the new user does not have.
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
                "this needs root or the capabilities setuid and setgid, and an id that the user namespace maps"
            ) from None

    def _verify(self) -> None:
        # A sandbox may report success without changing anything.
        for name, expected, ids in (("uid", self.uid, os.getresuid()), ("gid", self.gid, os.getresgid())):
            # Real, effective and saved: each of the three allows the others to be set again (setresuid(2)).
            if expected is not None and set(ids) != {expected}:
                raise CredentialsError(
                    f"--{name} {expected}: the process still runs as {name} {max(set(ids) - {expected})}"
                )
        if self.groups is not None:
            kept = set(os.getgroups()) - set(self.groups)
            if kept:
                raise CredentialsError(
                    f"--uid {self.uid}: the process still has the supplementary group {min(kept)}, "
                    "which this user does not have"
                )


def resolve(uid: int | None, gid: int | None) -> Credentials:
    """Return the credentials for `--uid` and `--gid`. Raises CredentialsError.

    The group and supplementary groups of a user are those of its passwd entry; `gid` overrides the group. A user
    without an entry, as in most containers, has no supplementary groups. Its group has the same number as the user,
    unless a group with this number exists: a system group may have rights that the operator did not intend. Entries are
    read now, before the root directory may change.
    """
    for option, number in (("uid", uid), ("gid", gid)):
        if number is not None and not 0 <= number <= _MOST:
            raise CredentialsError(f"--{option} {number}: out of range; accepted are 0 to {_MOST}")
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
                    f"--uid {uid}: no such user, and the group {uid} is {name}; choose the group with --gid"
                ) from None
        groups: tuple[int, ...] = (gid,)
    else:
        gid = entry.pw_gid if gid is None else gid
        groups = tuple(sorted(set(os.getgrouplist(entry.pw_name, gid))))
    # A process of this user keeps its groups, since changing them needs privileges.
    return Credentials(uid, gid, None if set(os.getresuid()) == {uid} else groups)


def _group_name(gid: int) -> str | None:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return None
