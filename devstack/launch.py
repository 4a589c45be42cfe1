"""Becomes another program that cannot outlive its parent. Run as a script, with no third-party import.

`launch.py PARENT SIGNAL ACCOUNT PROGRAM ARGUMENT...`: take the account (`-`: stay), raise the limit of open files, ask
the kernel for SIGNAL when the process PARENT is gone (Linux), and exec PROGRAM. The process id stays the same.

A script instead of `preexec_fn`, because Python code between fork and exec can deadlock in a process with threads. The
account is changed before the signal is asked for: a change of account takes the request back.
"""

import contextlib
import ctypes
import os
import pwd
import resource
import sys

PR_SET_PDEATHSIG = 1
ENOUGH_OPEN_FILES = 1 << 20


def _become(account: str) -> None:
    entry = pwd.getpwnam(account)
    os.initgroups(account, entry.pw_gid)
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


def _raise_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH_OPEN_FILES if hard == resource.RLIM_INFINITY else hard
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    # macOS refuses more than a limit of its own; its default is enough for a few hundred devices.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _die_with_parent(parent: int, signal_number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(f"not started: the parent process {parent} is gone already")


def main() -> None:
    """Take the arguments above and become the program."""
    parent, signal_number, account, *command = sys.argv[1:]
    if account != "-":
        _become(account)
    _raise_open_files()
    _die_with_parent(int(parent), int(signal_number))
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
