"""Errors in what the user gave: a message names it and says what to do."""


class InputError(Exception):
    """Something the user gave cannot be used. The command line prints the message and exits with code 2.

    Not a ValueError: handlers of library errors must not catch it.
    """


class MissingFileError(InputError):
    """A repository was reached but lacks this file; one that cannot be reached is a plain `InputError`."""
