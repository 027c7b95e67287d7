"""The exceptions that are meant for a person."""


class UserError(Exception):
    """A mistake that the person at the keyboard can put right.

    The message is one sentence that names the field, the value found and the choices or the way
    out. The command line prints it and exits with status 2; no traceback. A programmer's mistake is
    an ``assert`` instead.
    """


class Unreachable(UserError):
    """What is named lies elsewhere and cannot be fetched now: who can do without it may."""
