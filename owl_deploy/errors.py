"""The exceptions that a user is meant to read: one line each, without a traceback."""

import signal


class UserError(Exception):
    """Something the user can mend: what is wrong, where, and what to do. Exit code 2."""


class DiskError(UserError):
    """A file cannot be written: what was finished before it is kept."""


class UnsupportedFamily(UserError):
    """A flavor of export has no graph for this kind of model; another may."""


class CheckFailed(Exception):
    """What was made is not what was asked for (parity, audit, a threshold): nothing is kept. Exit code 1."""


def last_lines(printed: str, count: int = 1) -> str:
    """The last lines that a program printed, on one line; empty if it printed nothing."""
    return " | ".join([line.strip() for line in printed.splitlines() if line.strip()][-count:])


def ending(code: int) -> str:
    """How a process ended, by its exit code as Python gives it: below 0 for a signal."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def first_line(error: BaseException) -> str:
    """What an exception of another package says, on one line: its message's first, or its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
