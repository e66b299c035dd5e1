"""Errors in what the user gave: a message names it and says what to do."""


class InputError(Exception):
    """Something the user gave cannot be used. The command line prints the message and exits with code 2.

    Not a ValueError: handlers of library errors must not catch it.
    """


class MissingFileError(InputError):
    """A folder or a repository lacks this file; a repository that cannot be reached is a plain `InputError`."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
