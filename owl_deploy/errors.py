"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user can mend: what is wrong, where, and what to do, in one line.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """
