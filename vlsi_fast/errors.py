"""Errors that a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """The message is the whole story, what is wrong and what to do: commands print it without a traceback."""

    exit_code = 2
    """Of the command that it ends: 2 bad input, 1 something did not work."""
    of_one_rank = False
    """Whether one rank alone may meet it, which then says it; else every rank does, and one a machine says it."""


class StoppedEarly(UserError):
    """A run that was asked to end, or whose time is over, has saved a checkpoint and ends before its last step."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: start it again, with --resume."""


SELF_EXPLAINING = (UserError, FileNotFoundError)
"""What commands print without a traceback. A file that is not there is Python's own error, with such a message."""
